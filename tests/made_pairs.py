"""The same pairs of images and captions as each kind of source, and some that are broken."""

import io
import json
import tarfile

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from mmgem_jax.data import pairs

SIDE = 24
WORDS = [
    "red",
    "green",
    "blue",
    "grey",
    "white",
    "black",
    "brown",
    "pink",
    "cat",
    "dog",
    "hat",
    "cup",
    "shoe",
    "tree",
    "house",
    "boat",
]


def file_of(image, kind="PNG"):
    """The bytes of a file of a PIL image."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def images(count, seed=0):
    """The bytes of so many PNG files of noise."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    return [file_of(Image.fromarray(image)) for image in pixels]


def captions(count, seed=0):
    """So many captions, no two alike."""
    random = np.random.default_rng(seed)
    words = [" ".join(random.permutation(WORDS)[: random.integers(1, 4)]) for _ in range(count)]
    return [f"{text} {number}" for number, text in enumerate(words)]


def write_tars(folder, examples, shards):
    """Tar files as img2dataset writes them, of (image, caption, json) bytes.

    None: no such member; without the last, one that is as usual.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(np.array_split(np.arange(len(examples)), shards)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in part.tolist():
                about = json.dumps({"key": number, "status": "success"}).encode()
                contents = (*examples[number], about)[:3]
                for suffix, content in zip(("png", "txt", "json"), contents, strict=True):
                    if content is not None:
                        member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    return str(folder / "*.tar")


def write_lines(folder, examples, name="train.jsonl"):
    """A JSON-lines file with paths of images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, caption) in enumerate(examples):
        (folder / f"{number}.png").write_bytes(image)
        lines.append(json.dumps({"image": f"{number}.png", "caption": caption.decode()}))
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def write_records(folder, examples, files):
    """array_record files of tf.train.Example."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, part in enumerate(np.array_split(np.arange(len(examples)), files)):
        path = folder / f"pairs.array_record-{place:05d}-of-{files:05d}"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for number in part.tolist():
            example = tf_example_pb2.Example()
            for name, value in zip(("image", "caption"), examples[number], strict=True):
                example.features.feature[name].bytes_list.value.append(value)
            writer.write(example.SerializeToString())
        writer.close()
    return str(folder / "pairs.array_record*")


def write_all(folder, count=40):
    """Fields of `config.data` by kind of source, each with the same pairs; and those pairs.

    The TFDS data set has a tokenizer.
    """
    examples = [(i, c.encode()) for i, c in zip(images(count), captions(count), strict=True)]
    lines = write_lines(folder / "lines", examples)
    pairs.build(str(folder / "tfds"), {"train": lines}, vocab_size=300)
    texts = {"tar": "{txt}", "jsonl": "{caption}", "array_record": "{caption}", "tfds": "{caption}"}
    fields = {
        kind: {"text_templates": (text,), "text_weights": (1.0,), "caption_template": text}
        for kind, text in texts.items()
    }
    fields["tar"]["files"] = (write_tars(folder / "tars", examples, 3),)
    fields["jsonl"]["files"] = (lines,)
    fields["array_record"]["files"] = (write_records(folder / "records", examples, 2),)
    fields["tfds"] |= {"files": (), "name": "pairs", "dir": str(folder / "tfds")}
    return fields, examples
