"""Sets that are read through TFDS, from array_record: classification, COCO's captions, pairs.

`annotation_hash` is over what was read of every record beside its image: a JSON array a line, in
the order of the records.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmgem_jax.data.annotation_files import reading
from mmgem_jax.data.text import as_text
from mmgem_jax.data.tfds_records import find_builder, open_split
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.caption_files import COCO_SPLITS
from mmgem_jax.evaluation.examples import Dataset, Images, captioned, labelled

# What names an image, the first of them that a set has; else its place in the split does.
KEYS = (("image/id",), ("file_name",), ("id",), ("vendor", "concept"))


@dataclasses.dataclass(frozen=True)
class TfdsCopy:
    """What `mmgem_jax.data.pipeline` has to know of a local copy; `config.data` will do as well."""

    name: str
    dir: str
    image_field: str = "image"
    regions_field: str = "regions"


def open_tfds(name: str, tfds_name: str, path: Path, split: str) -> Dataset:
    """A split of a TFDS set in the folder of TFDS data sets `path`, by the fields that it has.

    `label`, a ClassLabel: classification, with the set's class names. `captions`: those of each
    image, as in `coco_captions`, whose splits and texts are Karpathy's. `caption`: pairs, by
    `open_pairs`.
    Raises UserError where the set, the split or such a field is missing.
    """
    copy = TfdsCopy(tfds_name, str(path))
    source = open_split(copy, split, "split")
    info = find_builder(copy).info
    protocol = protocol_of(info, split)
    read = functools.partial(encoded_image, source, copy.image_field)
    if "label" in info.features and isinstance(info.features["label"], tfds.features.ClassLabel):
        annotations = [(key, int(record["label"])) for key, record in keyed(info, source)]
        rows = [(key, place, label) for place, (key, label) in enumerate(annotations)]
        class_names = info.features["label"].names
        return labelled(name, protocol, rows, class_names, record_hash(annotations), read)
    if "captions" in info.features:
        with reading(name, "captions, each with a text"):
            annotations = [
                (key, [as_text(text) for text in record["captions"]["text"]])
                for key, record in keyed(info, source)
            ]
        rows = [(key, place, texts) for place, (key, texts) in enumerate(annotations)]
        if info.name == "coco_captions":
            protocol = COCO_SPLITS.get(split, protocol)
        return captioned(name, protocol, rows, record_hash(annotations), read)
    if "caption" in info.features:
        return open_pairs(name, copy, split, "caption")
    found = sorted(info.features)
    raise UserError(f"{name}: found the fields {found}, expected label, captions or caption")


def open_pairs(name: str, data: Any, split: str, text_field: str, class_field: str = "") -> Dataset:
    """A split whose images have one text each, which many images may share: the emoji's names.

    The texts are the distinct ones, sorted, and relevant to all images that have them; the classes
    those that occur in the split, sorted. `data` is `config.data` or a `TfdsCopy`. Raises UserError
    where the set, the split or a field is missing, or a text is empty.
    """
    source = open_split(data, split, "split")
    info = find_builder(data).info
    for field in (text_field, class_field):
        if field and field not in info.features:
            known = sorted(info.features)
            raise UserError(f"{name}: no field {field!r} in {data.name}; there are {known}")
    keys, texts, classes = [], [], []
    for key, record in keyed(info, source):
        with reading(f"{name}: image {key}", "texts in UTF-8"):
            text = as_text(record[text_field]).strip()
            classes += [as_text(record[class_field])] if class_field else []
        if not text:
            raise UserError(f"{name}: image {key}: {text_field} is empty; expected a text")
        keys.append(key)
        texts.append(text)
    class_names = sorted(set(classes))
    index = {class_name: label for label, class_name in enumerate(class_names)}
    return Dataset(
        name=name,
        protocol=protocol_of(info, split),
        images=Images(
            range(len(source)), functools.partial(encoded_image, source, data.image_field)
        ),
        image_keys=keys,
        image_ids=texts,
        texts=sorted(set(texts)),
        text_ids=sorted(set(texts)),
        labels=[index[class_name] for class_name in classes],
        class_names=class_names,
        annotation_hash=record_hash(zip(keys, texts, classes or texts, strict=True)),
    )


def protocol_of(info: tfds.core.DatasetInfo, split: str) -> str:
    """The protocol id of a split that goes by no published one."""
    return f"{info.full_name.replace('/', '-')}-{split}"


def keyed(info: tfds.core.DatasetInfo, source: Sequence):
    """Every record with what names its image."""
    fields = next((fields for fields in KEYS if all(f in info.features for f in fields)), ())
    for place, record in enumerate(source):
        if len(fields) == 1 and isinstance(record[fields[0]], (int, np.integer)):
            yield int(record[fields[0]]), record
        else:
            yield "/".join(as_text(record[field]) for field in fields) or str(place), record


def encoded_image(source: Sequence, image_field: str, place: int) -> bytes:
    """The bytes of the image of a record."""
    return source[place][image_field]


def record_hash(annotations) -> str:
    """sha256 over annotations, a JSON array a line."""
    digest = hashlib.sha256()
    for annotation in annotations:
        digest.update(f"{json.dumps(annotation)}\n".encode())
    return digest.hexdigest()
