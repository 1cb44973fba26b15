"""Sets of regions, each with one text: Visual Genome, RefCOCO, and those that come through TFDS.

The published ones have one reader each, that takes the folder of the local copy; the layout that it
expects there is in its docstring. They have no texts of whole images. `annotation_hash` is over the
files that the docstring names, in that order.

Every region is a key with one reference, as the published scorers of region captions have it
(TAP's for Visual Genome, GLaMM's for RefCOCOg). Where an object has several texts, each is a region
of its own, with the same image and the same box: they are captioned alike and scored against one
reference each, and a retrieval must take any of them for the object.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mmgem_jax.data import region_files
from mmgem_jax.data.annotation_files import name_lines, read_file, reading
from mmgem_jax.data.region_files import Record, has_area, image_size, on_image
from mmgem_jax.data.text import as_text
from mmgem_jax.data.tfds_records import find_builder, open_split
from mmgem_jax.data.training_example import corners
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.examples import Dataset, Images, Regions
from mmgem_jax.evaluation.tfds_sets import encoded_image, keyed, protocol_of, record_hash
from mmgem_jax.models.pooling import good_boxes


def visual_genome(name: str, path: Path, split: str) -> Dataset:
    """Visual Genome's region descriptions as they are published, which has no published protocol.

    `region_descriptions.json`, then `image_data.json` where it is there, then `SPLIT.txt` where a
    split is asked for: the ids of its images, one a line. The images in `VG_100K/` and
    `VG_100K_2/`. Boxes are cut at the image's edge; the few regions without an area or a text are
    left out, together with images that have none, and their number is in the protocol id.
    """
    digest = hashlib.sha256()
    records = region_files.visual_genome(path, path, digest)
    if split:
        records = list(records)
        ids = set(name_lines(read_file(path / f"{split}.txt", digest), path / f"{split}.txt"))
        if unknown := sorted(ids - {str(record.key) for record in records}):
            found = f"{', '.join(unknown[:3])}, {len(unknown)} in all"
            raise UserError(f"{path / split}.txt: found {found}, of no image; expected image ids")
        records = [record for record in records if str(record.key) in ids]
    counts, kept = Counter(), []
    for record in records:
        size = record.size or image_size(record.path)
        regions = [
            region for _, region in region_files.usable_regions(record.regions, size, counts)
        ]
        if regions:
            kept.append(Record(record.key, record.path, size, regions))
    dropped = counts["without area"] + counts["without text"]
    parts = ["visual-genome", split, f"{dropped}-dropped" if dropped else ""]
    return _dataset(name, "-".join(filter(None, parts)), kept, [], digest)


def vg_regions(name: str, path: Path) -> Dataset:
    """Visual Genome's test images as GRiT prepared them: 5,000 with 232,935 regions.

    `annotations/test.json`; the images in `images/`. What region captioning with ground-truth boxes
    is reported on, each region a key with one reference. GLaMM and those after it report on a part,
    one region an image: with their file in its place, the protocol id says that it is a part.
    """
    digest = hashlib.sha256()
    records = region_files.coco_regions(path / "annotations" / "test.json", path / "images", digest)
    return _dataset(name, "vg-region-1ref", records, [], digest)


def refcoco(name: str, path: Path, split: str) -> Dataset:
    """RefCOCO, RefCOCO+ or RefCOCOg, every expression a region; the classes are COCO's.

    `refs(unc).p`, of RefCOCOg `refs(umd).p`, then `instances.json`; the images in `train2014/`. The
    split is one of the published ones, `val` where none is asked for; `google/val` is that of
    `refs(google).p`. UNC's and UMD's splits share no image with their training split; Google's do.
    """
    by, _, part = split.rpartition("/")
    by, part = by or ("umd" if name == "refcocog" else "unc"), part or "val"
    digest = hashlib.sha256()
    file = path / f"refs({by}).p"
    splits, class_names = region_files.refcoco(file, path / "train2014", digest)
    if part not in splits:
        raise UserError(f"split: found {part!r} of {file.name}, expected one of {sorted(splits)}")
    return _dataset(name, f"{name}-{by}-{part}", splits[part], class_names, digest)


def refcocog_captions(name: str, path: Path) -> Dataset:
    """RefCOCOg's validation split (UMD) as mdetr lists it: 4,896 expressions in 1,300 images.

    `finetune_refcocog_val_captions.json`; the images in `train2014/`. What GLaMM scores region
    captions on, each expression a key with one reference.
    """
    digest = hashlib.sha256()
    file = path / "finetune_refcocog_val_captions.json"
    records = region_files.coco_regions(file, path / "train2014", digest)
    return _dataset(name, "refcocog-val", records, [], digest)


def _dataset(name: str, protocol: str, records: Iterable[Record], class_names, digest) -> Dataset:
    """The data set of records, whose boxes are cut at the image's edge, as annotations round."""
    records = list(records)
    rows, boxes = [], []
    for place, record in enumerate(records):
        size = record.size or image_size(record.path)
        for region in record.regions:
            rows.append((place, region.key, region.text, region.category))
            boxes.append(on_image(region.box, size))
            if not has_area(boxes[-1]):
                raise UserError(
                    f"{name}: region {region.key}: box {list(region.box)} of an image of {size[0]} "
                    f"x {size[1]}; expected x, y, width, height with an area within it"
                )
    return Dataset(
        name=name,
        protocol=protocol,
        images=Images([record.path for record in records]),
        image_keys=[record.key for record in records],
        image_ids=list(range(len(records))),
        texts=[],
        text_ids=[],
        labels=[],
        class_names=[],
        annotation_hash=digest.hexdigest(),
        regions=_regions(name, rows, boxes, class_names),
    )


def _regions(name: str, rows: list[tuple], boxes: list, class_names: list[str]) -> Regions:
    """Of rows (place of the image, key, text, category); UserError as `open_regions` says."""
    if not rows:
        raise UserError(f"{name}: found no region, expected one or more")
    key, times = Counter(key for _, key, _, _ in rows).most_common(1)[0]
    if times > 1:
        raise UserError(f"{name}: region {key}: found {times} times, expected keys that differ")
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    for _, key, text, category in rows:
        if not text:
            raise UserError(f"{name}: region {key}: found no text, expected one")
        if labels and category not in labels:
            raise UserError(f"{name}: region {key}: category {category!r}, expected a class")
    return Regions(
        images=np.asarray([place for place, _, _, _ in rows]),
        boxes=np.asarray(boxes, np.float32),
        texts=[text for _, _, text, _ in rows],
        keys=[key for _, key, _, _ in rows],
        labels=[labels[category] for _, _, _, category in rows] if labels else [],
        class_names=list(class_names),
    )


def open_regions(name: str, data: Any, split: str, text_field: str = "") -> Dataset:
    """A split of a TFDS set of regions, as `data/regions.py` and `data/scenes.py` write them.

    An image's key is its `id`, a region's is ID/PLACE, its place in the record. The classes are the
    categories that occur in the split, sorted; none where they are empty.

    Args:
      name: of the data set.
      data: `config.data` or a `TfdsCopy`.
      split: one of the set's.
      text_field: the field with a text of the whole image; "" for none.

    Raises:
      UserError: the set, the split or a field is missing; a text is empty; a box has no area, or is
        not within the image; some regions alone have a category.
    """
    source = open_split(data, split, "split")
    info = find_builder(data).info
    for field in ("id", data.regions_field, *([text_field] if text_field else [])):
        if field not in info.features:
            known = sorted(info.features)
            raise UserError(f"{name}: no field {field!r} in {data.name}; there are {known}")
    keys, texts, rows, boxes = [], [], [], []
    for place, (key, record) in enumerate(keyed(info, source)):
        keys.append(key)
        if text_field:
            texts.append(as_text(record[text_field]).strip())
            if not texts[-1]:
                raise UserError(f"{name}: image {key}: {text_field} is empty; expected a text")
        for region, text, category, box in _of_record(name, key, record[data.regions_field]):
            rows.append((place, region, text, category))
            boxes.append(box)
    class_names = sorted({category for _, _, _, category in rows} - {""})
    read = functools.partial(encoded_image, source, data.image_field)
    return Dataset(
        name=name,
        protocol=protocol_of(info, split),
        images=Images(range(len(source)), read),
        image_keys=keys,
        image_ids=list(range(len(keys))),
        texts=texts,
        text_ids=list(range(len(texts))),
        labels=[],
        class_names=[],
        annotation_hash=record_hash([keys, texts, *zip(rows, boxes, strict=True)]),
        regions=_regions(name, rows, boxes, class_names),
    )


def _of_record(name: str, key, regions: dict):
    """(key, text, category, box as x0, y0, x1, y1) of every region of a TFDS record."""
    with reading(name, "regions with a bbox, a text and a category"):
        boxes = corners(regions["bbox"])
        texts = [as_text(text).strip() for text in regions["text"]]
        categories = [as_text(category) for category in regions["category"]]
        rows = list(zip(boxes.tolist(), texts, categories, strict=True))
    for number, (box, text, category) in enumerate(rows):
        if not good_boxes(box):
            raise UserError(
                f"{name}: region {key}/{number}: box {box}; expected x0, y0, x1, y1 with "
                "0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
            )
        yield f"{key}/{number}", text, category, box
