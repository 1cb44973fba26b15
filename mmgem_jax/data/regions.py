"""Published region annotations as a TFDS data set in array_record, `regions/NAME`.

What becomes of the annotations, counted for every split:

- a box that reaches outside its image is cut at the edge;
- a region is dropped whose box has no area then, or that has no text;
- an image is left out that has no region after that, or, if the builder is asked to bear it, whose
  file is missing or broken; otherwise such a file is an error.
"""

import contextlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from mmgem_jax.data import array_records
from mmgem_jax.data.region_files import (
    Record,
    coco_regions,
    image_ids,
    refcoco,
    usable_regions,
    visual_genome,
)
from mmgem_jax.data.tokenizer import train_bpe
from mmgem_jax.errors import UserError


class Regions(tfds.core.GeneratorBasedBuilder):
    """Records of an image, as the bytes of its file, and its regions: boxes with texts."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, splits, **kwargs):
        """`splits`: examples, as tfds takes them, by split name."""
        self._splits = splits
        super().__init__(**kwargs)

    def _info(self):
        text = tfds.features.Text()
        region = {"bbox": tfds.features.BBoxFeature(), "text": text, "category": text}
        features = {
            "id": text,
            "image": tfds.features.Image(),
            "regions": tfds.features.Sequence(region),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return self._splits

    def _generate_examples(self):
        raise AssertionError("every split brings its own generator")


def examples(records: Iterable[Record], counts: Counter, allow_missing: bool) -> Iterator[tuple]:
    """(key, TFDS record) of every record that has a usable region.

    `counts` is added to by cause, as `usable_regions` does it, and "images", of which "missing or
    broken" and "without a region". Raises UserError for an image that is missing or broken, unless
    allowed, and where no record is left.
    """
    left = 0
    for record in records:
        counts["images"] += 1
        try:
            with Image.open(record.path) as image:
                image.load()
                size = record.size or image.size
            encoded = record.path.read_bytes()
        except Exception as error:  # Pillow's plug-ins raise all kinds on a broken file
            if not allow_missing:
                raise UserError(f"{record.path}: {error}; expected a whole image file") from None
            counts["missing or broken"] += 1
            continue
        kept = usable_regions(record.regions, size, counts)
        if not kept:
            counts["without a region"] += 1
            continue
        left += 1
        regions = [
            {"bbox": _bbox(corners), "text": region.text, "category": region.category}
            for corners, region in kept
        ]
        yield (
            str(record.key),
            {"id": str(record.key), "image": io.BytesIO(encoded), "regions": regions},
        )
    if not left:
        raise UserError(f"found no image with a region; expected one or more ({dict(counts)})")


def _bbox(corners):
    x0, y0, x1, y1 = corners.tolist()
    return tfds.features.BBox(ymin=y0, xmin=x0, ymax=y1, xmax=x1)


def read_splits(
    layout: str,
    annotations: Path,
    images: Path,
    held_out: dict[str, Path],
    leave_out: Path | None = None,
) -> dict[str, list[Record]]:
    """The records of published annotations, by split.

    RefCOCO's splits are the published ones. The others have none: all is `train` but for the images
    that are held out, to be evaluated on.

    Args:
      layout: "visual-genome", a folder for `region_files.visual_genome`; "refcoco", a refs file, or
        the folder of the only one; "coco", a file for `region_files.coco_regions`.
      annotations: that file or folder.
      images: folder of the images.
      held_out: a file of image ids, as `image_ids` reads it, by the split that they make up. The
        first that names an image has it.
      leave_out: a file of ids of images for no split at all.

    Raises:
      UserError: annotations as their reader says, or ids of which none is that of an image.
    """
    if layout == "refcoco":
        if held_out:
            raise UserError(f"{min(held_out)}: found with refcoco, which has splits; expected none")
        splits, _ = refcoco(refs_file(annotations), images)
    elif layout == "coco":
        splits = {"train": coco_regions(annotations, images)}
    else:
        splits = {"train": list(visual_genome(annotations, images))}
    if leave_out:
        ids = _known_ids(leave_out, splits)
        splits = {split: _parted(records, ids)[1] for split, records in splits.items()}
    for split, file in held_out.items():
        ids = _known_ids(file, splits)
        splits[split], splits["train"] = _parted(splits["train"], ids)
    return splits


def refs_file(annotations: Path) -> Path:
    """The file itself, or the only `refs(...).p` of the folder; UserError."""
    if not annotations.is_dir():
        return annotations
    files = sorted(annotations.glob("refs(*).p"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{annotations}: found {found}; expected one refs(...).p, or name the file")
    return files[0]


def _known_ids(file, splits):
    ids = image_ids(file)
    if not any(_parted(records, ids)[0] for records in splits.values()):
        found = ", ".join(sorted(ids)[:3]) or "nothing"
        raise UserError(f"{file}: found {found}; expected ids of images in the annotations")
    return ids


def _parted(records, ids):
    """The records of images that are named, and the others."""
    named, others = [], []
    for record in records:
        (named if {str(record.key), record.path.stem} & ids else others).append(record)
    return named, others


def build(
    data_dir: str | Path,
    name: str,
    splits: dict[str, list[Record]],
    allow_missing: bool = False,
    vocab_size: int | None = None,
) -> tuple[Path, dict[str, Counter]]:
    """Builds the data set `regions/NAME` in `data_dir`.

    Args:
      data_dir: folder of TFDS data sets.
      name: what to call the set.
      splits: records by split name.
      allow_missing: leave images out whose files are missing or broken.
      vocab_size: if given, a BPE of that size is trained on the texts of `train` and saved with the
        data; otherwise the run names its own tokenizer.

    Returns:
      The folder of the built data set, and by split what was there, cut and left out (`examples`).

    Raises:
      UserError: an image is missing or broken, or listed twice, a split is empty, or the data set
        is there already.
    """
    if not re.fullmatch(r"[\w-]+", name):  # "/" is a folder to tfds, "." a version
        raise UserError(f"name: found {name!r}; expected letters, digits, - and _")
    _check_keys(splits)
    counts = {split: Counter() for split in splits}
    parts = {s: examples(records, counts[s], allow_missing) for s, records in splits.items()}
    with _quiet():
        config = tfds.core.BuilderConfig(name=name)
        builder = Regions(splits=parts, data_dir=data_dir, config=config)
    if builder.data_path.exists():
        raise UserError(f"{builder.data_path} exists; delete it or give another name")
    tokenizer = None
    if vocab_size:  # first, so that a size that cannot be leaves nothing behind
        if "train" not in splits:
            raise UserError(f"vocab_size: found the splits {sorted(splits)}; expected train")
        texts = (r.text for record in splits["train"] for r in record.regions if r.text)
        tokenizer = train_bpe(texts, vocab_size)
    array_records.write(builder)
    if tokenizer:
        tokenizer.save_pretrained(builder.data_path / "tokenizer")
    return builder.data_path, counts


def _check_keys(splits):
    for split, records in splits.items():
        key, times = Counter(str(r.key) for r in records).most_common(1)[0] if records else ("", 0)
        if times != 1:
            found = f"image {key} {times} times" if records else "no image"
            raise UserError(f"{split}: found {found}; expected images, each once")


@contextlib.contextmanager
def _quiet():
    """Without tfds's warning that the set's name is not one that it knows."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
