"""Image-text sets that are published as images in folders and captions in JSON or text files.

All of them have one reader each, named after the set, that takes the folder of the local copy; the
layout that it expects there is in its docstring. `annotation_hash` is over the files that the
docstring names, in the order that it names them.
"""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import TextIO

from mmgem_jax.data.annotation_files import decoded, parse_json, read_file, reading
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.examples import Dataset, captioned

COCO_SPLITS = {"test": "coco-karpathy-test-5k", "val": "coco-karpathy-val-5k"}
FLICKR30K_SPLITS = {"test": "flickr30k-karpathy-test-1k", "val": "flickr30k-karpathy-val-1k"}
SHAREGPT4V = "share-captioner_coco_lcs_sam_1246k_1107.json"
CHUNK = 1 << 18  # characters that are read at once
LONGEST = 1 << 22  # characters of an entry, at most


def coco(name: str, path: Path, split: str) -> Dataset:
    """COCO 2014 in Karpathy's split: 5,000 images with all of their captions, five or more.

    `dataset_coco.json`; the images where its `filepath` and `filename` say: `val2014/`.
    """
    return _karpathy(name, path / "dataset_coco.json", "val2014", COCO_SPLITS, split or "test")


def flickr30k(name: str, path: Path, split: str) -> Dataset:
    """Flickr30k in Karpathy's split: 1,000 images (1,014 in `val`) with five captions each.

    `dataset_flickr30k.json`, which names no folder; the images in `flickr30k-images/`.
    """
    file = path / "dataset_flickr30k.json"
    return _karpathy(name, file, "flickr30k-images", FLICKR30K_SPLITS, split or "test")


def _karpathy(name, file, folder, protocols, split) -> Dataset:
    if split not in protocols:
        raise UserError(f"split: {split!r} of {name}, expected one of {sorted(protocols)}")
    digest = hashlib.sha256()
    content = parse_json(read_file(file, digest), file)
    with reading(file, "images with a split, a filename and sentences with a raw text"):
        rows = [
            (
                entry.get("cocoid", entry["filename"]),
                file.parent / entry.get("filepath", folder) / entry["filename"],
                [sentence["raw"] for sentence in entry["sentences"]],
            )
            for entry in content["images"]
            if entry["split"] == split
        ]
    return captioned(name, protocols[split], rows, digest.hexdigest())


def coco_val2017(name: str, path: Path) -> Dataset:
    """COCO's val2017: 5,000 images with the first five captions of each, in the file's order.

    `annotations/captions_val2017.json`; the images in `val2017/`. Another choice of COCO's images
    and captions than Karpathy's test split: the scores of the two do not compare.
    """
    file = path / "annotations" / "captions_val2017.json"
    digest = hashlib.sha256()
    content = parse_json(read_file(file, digest), file)
    with reading(file, "images with id and file_name, annotations with image_id and caption"):
        files = {image["id"]: image["file_name"] for image in content["images"]}
        captions = {image: [] for image in files}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        rows = [
            (image, path / "val2017" / files[image], captions[image][:5]) for image in sorted(files)
        ]
    return captioned(name, "coco-val2017-5cap", rows, digest.hexdigest())


def urban1k(name: str, path: Path) -> Dataset:
    """Urban1k (Long-CLIP): 1,000 images, each with the first line alone of its caption file.

    `caption/STEM.txt`, sorted; the images are `image/STEM.jpg`.
    """
    captions = _visible(path / "caption", ".txt")
    stems = {file.stem for file in captions}
    for image in _visible(path / "image", ".jpg"):
        if image.stem not in stems:
            raise UserError(f"{image}: found no caption/{image.stem}.txt, expected one an image")
    digest = hashlib.sha256()
    rows = []
    for file in captions:
        text = decoded(read_file(file, digest), file)
        first = io.StringIO(text, newline=None).readline()
        rows.append((file.stem, path / "image" / f"{file.stem}.jpg", [first]))
    return captioned(name, "urban1k-line1", rows, digest.hexdigest(), long_text=True)


def _visible(folder: Path, suffix: str) -> list[Path]:
    """The folder's files with this suffix, sorted, without those that only a desktop left there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected files {suffix}")
    return sorted(file for file in folder.glob(f"*{suffix}") if not file.name.startswith("."))


def sharegpt4v_1k(name: str, path: Path) -> Dataset:
    """ShareGPT4V's first 1,000 pairs, which Long-CLIP holds out: the text is the second turn.

    `share-captioner_coco_lcs_sam_1246k_1107.json`; the images where its `image` says, such as
    `sam/images/sa_1.jpg`. A model that was trained on the whole file has seen these pairs.
    """
    file = path / SHAREGPT4V
    try:
        with file.open("rb") as stream:
            annotation_hash = hashlib.file_digest(stream, "sha256").hexdigest()
        with file.open(encoding="utf-8") as stream:
            entries = _first_entries(stream, 1000)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; expected an annotation file") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{file}: {error}; expected a JSON list") from None
    with reading(file, "entries with an image and conversations of two turns with a value"):
        rows = [
            (
                entry["image"],
                path / entry["image"],
                [entry["conversations"][1]["value"].replace("\n", " ")],
            )
            for entry in entries
        ]
    return captioned(name, "sharegpt4v-1k", rows, annotation_hash, long_text=True)


def _first_entries(stream: TextIO, count: int) -> list:
    """The first objects of a JSON list; what follows them, more than a gigabyte, is not read."""
    decoder, entries = json.JSONDecoder(), []
    text = stream.read(CHUNK).lstrip()
    if not text.startswith("["):
        raise ValueError(f"found {text[:20]!r}")
    text = text[1:]
    while len(entries) < count:
        text = text.lstrip(" \t\r\n,")
        if text.startswith("]"):
            break
        try:
            entry, end = decoder.raw_decode(text)
        except json.JSONDecodeError:
            more = stream.read(CHUNK) if len(text) < LONGEST else ""
            if not more:
                raise
            text += more  # the object goes on there
        else:
            entries.append(entry)
            text = text[end:]
    return entries


def dci(name: str, path: Path) -> Dataset:
    """DCI as LoTLIP merges it: all splits, 7,805 images, short and extra caption in one text.

    `splits.json`, then `annotations/FILE` in its order; the images in `photos/`.
    """
    file = path / "splits.json"
    digest = hashlib.sha256()
    splits = parse_json(read_file(file, digest), file)
    with reading(file, "a list of files by split"):
        files = [path / "annotations" / entry for split in splits.values() for entry in split]
    rows = []
    for file in files:
        with reading(file, "image, short_caption and extra_caption"):
            entry = parse_json(read_file(file, digest), file)
            text = "\n".join([entry["short_caption"], entry["extra_caption"]])
            rows.append((entry["image"], path / "photos" / entry["image"], [rejoined(text)]))
    return captioned(name, "dci-lotlip", rows, digest.hexdigest(), long_text=True)


def rejoined(text: str) -> str:
    """The text's sentences, cut at line ends, `</s>` and full stops, joined by ". " (LoTLIP)."""
    sentences = (sentence.strip() for sentence in re.split(r"\n|</s>|\.", text))
    return ". ".join(sentence for sentence in sentences if sentence)
