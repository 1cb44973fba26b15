"""Regions of images as they are published: Visual Genome, RefCOCO, and COCO-style caption files.

Each reader gives a plain stream of records, an image with its regions, in the order of the file.
What the files hold is kept as it is; `usable_regions` says what training can use of it.
"""

import dataclasses
import io
import math
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mmgem_jax.data.annotation_files import name_lines, parse_json, read_file, reading
from mmgem_jax.errors import UserError

VISUAL_GENOME_FOLDERS = ("VG_100K", "VG_100K_2")  # of the images, as they are published


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A box of an image and what is in it."""

    key: int | str  # published id, different for each of a file
    box: tuple[float, float, float, float]  # x, y, width, height in pixels, as published
    text: str  # may be empty, as published
    category: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """An image and its regions."""

    key: int | str  # published id
    path: Path  # of the image file, which need not be there
    size: tuple[int, int] | None  # width and height that the boxes are in; None: the file's own
    regions: list[Region]


# ---- Visual Genome -------------------------------------------------------------------------------


def visual_genome(folder: Path, images: Path, digest=None) -> Iterator[Record]:
    """Visual Genome's region descriptions: `region_descriptions.json` in the folder.

    `image_data.json` beside it, where there is one, gives the images' sizes, and in their urls
    which of `VG_100K` and `VG_100K_2` they are in. All images in `images` itself will do as well.
    The file is read at once: 5.4 million regions take several GiB.

    `digest`, if given, is updated with the files' bytes in this order. Raises UserError.
    """
    file = folder / "region_descriptions.json"
    entries = parse_json(read_file(file, digest), file)
    sizes, folders = _image_data(folder / "image_data.json", digest)
    corners = ("x", "y", "width", "height")
    with reading(file, "images with an id and regions with x, y, width, height and a phrase"):
        for entry in entries:
            key = entry["id"]
            regions = [
                Region(
                    region["region_id"],
                    _box(file, region["region_id"], [region[name] for name in corners]),
                    _text(file, region["region_id"], region["phrase"]),
                )
                for region in entry["regions"]
            ]
            found = [folders[key]] if key in folders else VISUAL_GENOME_FOLDERS
            paths = [images / place / f"{key}.jpg" for place in (*found, "")]
            path = next((path for path in paths if path.is_file()), paths[0])
            yield Record(key, path, sizes.get(key), regions)


def _image_data(file: Path, digest) -> tuple[dict, dict]:
    """Sizes and folders of the images that the file lists; none where it is not there."""
    if not file.exists():
        return {}, {}
    entries = parse_json(read_file(file, digest), file)
    with reading(file, "images with image_id, width, height and url"):
        sizes = {entry["image_id"]: _size(file, entry) for entry in entries}
        folders = {entry["image_id"]: entry["url"].split("/")[-2] for entry in entries}
    return sizes, folders


# ---- RefCOCO, RefCOCO+ and RefCOCOg --------------------------------------------------------------


def refcoco(refs: Path, images: Path, digest=None) -> tuple[dict[str, list[Record]], list[str]]:
    """RefCOCO, RefCOCO+ or RefCOCOg: `refs(unc).p` or another, and `instances.json` beside it.

    Every sentence of an object is a region of its own, whose box is the object's and whose key is
    the sentence's. The text is the cleaned `sent`. The file name of a ref is not an image's; that
    of `instances.json` is.

    Returns:
      The records by published split, and the names of all categories, in the order of their ids.

    `digest`, if given, is updated with the two files' bytes in this order. Raises UserError.
    """
    entries = load_plain_pickle(read_file(refs, digest), refs)
    file = refs.parent / "instances.json"
    instances = parse_json(read_file(file, digest), file)
    with reading(file, "images, annotations with a bbox, and categories with a name"):
        sizes = {entry["id"]: _size(file, entry) for entry in instances["images"]}
        names = {entry["id"]: entry["file_name"] for entry in instances["images"]}
        boxes = {e["id"]: _box(file, e["id"], e["bbox"]) for e in instances["annotations"]}
        categories = {entry["id"]: entry["name"] for entry in instances["categories"]}
        class_names = [categories[key] for key in sorted(categories)]
    splits = {}
    with reading(refs, f"refs with split, image_id, ann_id and category_id of {file.name}"):
        for entry in entries:
            key = entry["image_id"]
            records = splits.setdefault(entry["split"], {})
            if key not in records:
                records[key] = Record(key, images / names[key], sizes[key], [])
            box, category = boxes[entry["ann_id"]], categories[entry["category_id"]]
            records[key].regions.extend(
                Region(s["sent_id"], box, _text(refs, s["sent_id"], s["sent"]), category)
                for s in entry["sentences"]
            )
    return {split: list(records.values()) for split, records in splits.items()}, class_names


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every name: what a pickle can call, it must name."""

    def find_class(self, module, name):
        raise UserError(f"found {module}.{name}, which would run as code")


def load_plain_pickle(content: bytes, where: object):
    """The lists, dicts, texts and numbers of a pickle, one of Python 2 too; it runs no code.

    Raises UserError for any other pickle, and for bytes that are none.
    """
    try:
        return _PlainUnpickler(io.BytesIO(content), encoding="utf-8", errors="replace").load()
    except Exception as error:  # a broken pickle makes pickle raise of all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where}: {reason}; expected a pickle of plain lists, dicts, texts and numbers"
        ) from None


# ---- COCO-style caption files --------------------------------------------------------------------


def coco_regions(file: Path, images: Path, digest=None) -> list[Record]:
    """A COCO-style file whose annotations have image_id, bbox and caption.

    GRiT's `train.json` and `test.json` of Visual Genome, an image with all its regions. And mdetr's
    `finetune_refcocog_val_captions.json`, which lists an image anew for every expression: images
    of one file are one record here. A caption that an annotation lacks is its image's, as in
    mdetr's files.

    `digest`, if given, is updated with the file's bytes. Raises UserError.
    """
    content = parse_json(read_file(file, digest), file)
    with reading(file, "images, and annotations with image_id, bbox and caption"):
        entries = {entry["id"]: entry for entry in content["images"]}
        records = {}
        for entry in content["images"]:
            name = entry["file_name"]
            if name not in records:
                key = entry.get("original_id", entry["id"])
                records[name] = Record(key, images / name, _size(file, entry), [])
        for annotation in content["annotations"]:
            key, entry = annotation["id"], entries[annotation["image_id"]]
            text = annotation["caption"] if "caption" in annotation else entry["caption"]
            region = Region(key, _box(file, key, annotation["bbox"]), _text(file, key, text))
            records[entry["file_name"]].regions.append(region)
    return list(records.values())


def image_ids(file: Path) -> set[str]:
    """Ids of images: of a text file, one a line, or of the images of a COCO-style JSON file.

    Of the latter, the stems of the file names, which Visual Genome's ids are. Raises UserError.
    """
    content = read_file(file)
    if file.suffix != ".json":
        return set(name_lines(content, file))
    with reading(file, "images with a file_name"):
        return {Path(entry["file_name"]).stem for entry in parse_json(content, file)["images"]}


# ---- Boxes ---------------------------------------------------------------------------------------


def _box(file, key, values) -> tuple[float, float, float, float]:
    try:
        x, y, width, height = map(float, values)
    except (ValueError, TypeError):
        raise UserError(
            f"{file}: region {key}: box {values!r}; expected x, y, width, height"
        ) from None
    return x, y, width, height


def _text(file, key, text) -> str:
    if not isinstance(text, str):
        raise UserError(f"{file}: region {key}: text {text!r}; expected a text")
    return text.strip()


def _size(file, entry) -> tuple[int, int]:
    size = entry["width"], entry["height"]
    if not all(isinstance(side, (int, float)) and side >= 1 for side in size):
        raise UserError(f"{file}: found an image of {size[0]!r} x {size[1]!r}; expected pixels")
    return size


def image_size(path: Path) -> tuple[int, int]:
    """Width and height that an image file states; UserError where it is none."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # Pillow's plug-ins raise all kinds on a broken file
        raise UserError(f"{path}: {error}; expected an image file") from None


def on_image(box, size) -> np.ndarray:
    """A box in pixels as shares of the image, cut at its edges.

    Args:
      box: x, y, width, height.
      size: width and height of the image.

    Returns:
      fp32 [4] as x0, y0, x1, y1; its area is not above 0 where that of the box is not, or the box
      is beside the image or not of finite numbers.
    """
    x, y, width, height = box
    if not all(map(math.isfinite, box)):
        return np.zeros(4, np.float32)
    edges = zip((x, y, x + width, y + height), (*size, *size), strict=True)
    return np.asarray([min(max(edge, 0), side) / side for edge, side in edges], np.float32)


def has_area(corners: np.ndarray) -> bool:
    """Whether x0 < x1 and y0 < y1."""
    x0, y0, x1, y1 = corners
    return bool(x0 < x1 and y0 < y1)


def usable_regions(
    regions: Iterable[Region], size: tuple[int, int], counts: Counter
) -> list[tuple[np.ndarray, Region]]:
    """The regions that training can use, with their corners as from `on_image`.

    A box that reaches outside the image is cut at its edge. A region is dropped whose box has no
    area then, or that has no text. `counts` is added to by cause: "regions" that were there, and of
    those "cut at the edge", "without area" and "without text".
    """
    kept = []
    for region in regions:
        counts["regions"] += 1
        corners = on_image(region.box, size)
        if not region.text:
            counts["without text"] += 1
        elif not has_area(corners):
            counts["without area"] += 1
        else:
            x, y, width, height = region.box
            outside = min(x, y) < 0 or x + width > size[0] or y + height > size[1]
            counts["cut at the edge"] += outside
            kept.append((corners, region))
    return kept
