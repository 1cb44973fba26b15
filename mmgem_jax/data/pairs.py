"""One's own image-text pairs as a TFDS data set in array_record, from a JSON-lines file."""

import io
import json
from pathlib import Path

import tensorflow_datasets as tfds
from PIL import Image

from mmgem_jax.data import array_records
from mmgem_jax.data.tokenizer import train_bpe
from mmgem_jax.errors import UserError


class Pairs(tfds.core.GeneratorBasedBuilder):
    """Records of an image, as the bytes of its file, and a caption."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, splits=None, **kwargs):
        """`splits`: path of a JSON-lines file by split name, to build; None to read."""
        self._files = {name: Path(path) for name, path in (splits or {}).items()}
        super().__init__(**kwargs)

    def _info(self):
        features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: read_pairs(path) for name, path in self._files.items()}

    def _generate_examples(self):
        raise AssertionError("every split brings its own generator")


def read_pairs(path):
    """(key, record) of every line `{"image": PATH, "caption": TEXT}`; paths relative to the file.

    Raises:
      UserError: a line that is no such object, an image that is absent or cannot be opened.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            pair = json.loads(line)
            image, caption = Path(pair["image"]), pair["caption"]
        except (ValueError, KeyError, TypeError):  # no JSON, not UTF-8, or another object
            found = line[:60].decode("utf-8", "replace")
            raise UserError(
                f'{where}: {found!r}; expected {{"image": PATH, "caption": TEXT}}'
            ) from None
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f"{where}: caption {caption!r}; expected a text")
        try:
            encoded = (path.parent / image).read_bytes()
            Image.open(io.BytesIO(encoded)).load()
        except Exception as error:  # Pillow's plug-ins raise all kinds on a broken file
            raise UserError(f"{where}: image {image}: {error}") from None
        yield number, {"image": io.BytesIO(encoded), "caption": caption}


def build(data_dir, splits, vocab_size=None):
    """Builds the data set `pairs` in `data_dir`.

    Args:
      data_dir: folder of TFDS data sets.
      splits: path of a JSON-lines file by split name; `train` among them.
      vocab_size: if given, a BPE of that size is trained on the training captions and saved with
        the data; otherwise the run names its own tokenizer.

    Returns:
      The folder of the built data set.

    Raises:
      UserError: a file is missing or wrong, or the data set is there already.
    """
    for name, path in splits.items():
        if not Path(path).is_file():
            raise UserError(f"{name}: no file {path}; expected one JSON object a line")
    if "train" not in splits:
        raise UserError(f"splits: found {sorted(splits)}; expected train among them")
    builder = Pairs(splits=splits, data_dir=data_dir)
    if builder.data_path.exists():
        raise UserError(f"{builder.data_path} exists; delete it or give another data_dir")
    tokenizer = None
    if vocab_size:  # first, so that a size that cannot be leaves nothing behind
        captions = (record["caption"] for _, record in read_pairs(Path(splits["train"])))
        tokenizer = train_bpe(captions, vocab_size)
    array_records.write(builder)
    if tokenizer:
        tokenizer.save_pretrained(builder.data_path / "tokenizer")
    return builder.data_path
