"""The data sets of an evaluation by name, each under the protocol whose numbers are published.

    coco               COCO 2014, Karpathy's split             split: test, val
    coco-val2017       COCO val2017, five captions an image
    flickr30k          Flickr30k, Karpathy's split             split: test, val
    urban1k            Urban1k, the first line of a caption
    sharegpt4v-1k      ShareGPT4V, the first 1,000 pairs
    dci                DCI as LoTLIP merges it
    imagenet           ImageNet's validation set               split: none, val
    folder/NAME        a folder of images for every class      split: a folder, or none
    wds/NAME           CLIP_benchmark's WebDataset folder      split: a folder, or test
    tfds/NAME          a TFDS set with labels or captions      split: one of its, or test
    emoji/CONFIG       this project's drawings                 split: one of its, or test
    emoji              the same as emoji/things

and with regions, each with one text:

    visual-genome      its region descriptions                 split: a file of image ids, or none
    vg-regions         Visual Genome's test images as in GRiT
    refcoco            RefCOCO, each expression a region       split: testA, testB, val, or BY/one
    refcoco+           RefCOCO+, likewise                      split: as of refcoco
    refcocog           RefCOCOg, likewise                      split: test, val, or BY/one
    refcocog-captions  RefCOCOg's val as in mdetr and GLaMM
    regions/NAME       a set of tools/build_regions.py         split: one of its, or test
    emoji_scenes/CONFIG  this project's scenes of drawings     split: one of its, or test
    emoji_scenes       the same as emoji_scenes/things

NAME of a folder is only what the results are to be called. The layout that each expects in its path
is in the docstring of its reader.
"""

import dataclasses
from pathlib import Path

import numpy as np

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import caption_files, region_sets
from mmgem_jax.evaluation.examples import Dataset, Images, Regions
from mmgem_jax.evaluation.image_folders import image_folder, imagenet
from mmgem_jax.evaluation.prompts import PLACE
from mmgem_jax.evaluation.tfds_sets import TfdsCopy, open_pairs, open_tfds
from mmgem_jax.evaluation.webdataset import webdataset

NAMES = (
    "coco",
    "coco-val2017",
    "flickr30k",
    "urban1k",
    "sharegpt4v-1k",
    "dci",
    "imagenet",
    "folder/NAME",
    "wds/NAME",
    "tfds/NAME",
    "emoji",
    "emoji/CONFIG",
    "visual-genome",
    "vg-regions",
    "refcoco",
    "refcoco+",
    "refcocog",
    "refcocog-captions",
    "regions/NAME",
    "emoji_scenes",
    "emoji_scenes/CONFIG",
)

WITHOUT_SPLITS = (
    *("coco-val2017", "urban1k", "sharegpt4v-1k", "dci"),
    *("vg-regions", "refcocog-captions"),
)

# Images, texts, classes and regions of the protocols whose size is published.
PUBLISHED = {
    "coco-karpathy-test-5k": (5000, 25010, 0, 0),
    "coco-karpathy-val-5k": (5000, 25010, 0, 0),
    "coco-val2017-5cap": (5000, 25000, 0, 0),
    "flickr30k-karpathy-test-1k": (1000, 5000, 0, 0),
    "flickr30k-karpathy-val-1k": (1014, 5070, 0, 0),
    "urban1k-line1": (1000, 1000, 0, 0),
    "sharegpt4v-1k": (1000, 1000, 0, 0),
    "dci-lotlip": (7805, 7805, 0, 0),
    "imagenet1k-val-50k": (50000, 0, 1000, 0),
    "vg-region-1ref": (5000, 0, 0, 232935),
    "refcoco-unc-val": (1500, 0, 0, 10834),
    "refcoco-unc-testA": (750, 0, 0, 5657),
    "refcoco-unc-testB": (750, 0, 0, 5095),
    "refcoco+-unc-val": (1500, 0, 0, 10758),
    "refcoco+-unc-testA": (750, 0, 0, 5726),
    "refcoco+-unc-testB": (750, 0, 0, 4889),
    "refcocog-umd-val": (1300, 0, 0, 4896),
    "refcocog-umd-test": (2600, 0, 0, 9602),
    "refcocog-val": (1300, 0, 0, 4896),
}


def open_dataset(
    name: str, path: str | Path, *, split: str = "", allow_missing: bool = False
) -> Dataset:
    """The data set of that name, from its local copy in the folder `path`.

    Where the counts are not the published ones, or none are published, the protocol id ends in
    them: a part of a set may be evaluated, but its numbers never go by the whole set's id. Images
    that are listed and not there are an error, or with `allow_missing` left out, together with
    their texts and regions, and named in `missing`. Raises UserError for an unknown name or split,
    and for annotations that are missing, unreadable or not as published.
    """
    dataset = _read(name, Path(path), split)
    return _stamped(_without_missing(dataset, allow_missing))


def _read(name: str, path: Path, split: str) -> Dataset:
    match name.split("/"):
        case ["coco"]:
            return caption_files.coco(name, path, split)
        case ["flickr30k"]:
            return caption_files.flickr30k(name, path, split)
        case [part] if split and part in WITHOUT_SPLITS:
            raise UserError(f"split: {split!r} of {name}, which has one alone; expected none")
        case ["coco-val2017"]:
            return caption_files.coco_val2017(name, path)
        case ["urban1k"]:
            return caption_files.urban1k(name, path)
        case ["sharegpt4v-1k"]:
            return caption_files.sharegpt4v_1k(name, path)
        case ["dci"]:
            return caption_files.dci(name, path)
        case ["imagenet"]:
            return imagenet(name, path, split)
        case ["folder", _, *_]:
            return image_folder(name, _joined(name, split), path, split)
        case ["wds", _, *_]:
            return webdataset(name, _joined(name, split or "test"), path, split or "test")
        case ["tfds", *parts] if parts:
            return open_tfds(name, "/".join(parts), path, split or "test")
        case ["emoji"]:
            return _emoji(name, "emoji/things", path, split)
        case ["emoji", _]:
            return _emoji(name, name, path, split)
        case _:
            return _read_regions(name, path, split)


def _read_regions(name: str, path: Path, split: str) -> Dataset:
    match name.split("/"):
        case ["visual-genome"]:
            return region_sets.visual_genome(name, path, split)
        case ["vg-regions"]:
            return region_sets.vg_regions(name, path)
        case ["refcoco" | "refcoco+" | "refcocog"]:
            return region_sets.refcoco(name, path, split)
        case ["refcocog-captions"]:
            return region_sets.refcocog_captions(name, path)
        case ["regions", _]:
            return region_sets.open_regions(name, TfdsCopy(name, str(path)), split or "test")
        case ["emoji_scenes"]:
            return _scenes(name, "emoji_scenes/things", path, split or "test")
        case ["emoji_scenes", _]:
            return _scenes(name, name, path, split or "test")
    raise UserError(f"dataset: found {name!r}, expected one of {', '.join(NAMES)}")


def _emoji(name: str, tfds_name: str, path: Path, split: str) -> Dataset:
    copy = TfdsCopy(tfds_name, str(path))
    dataset = open_pairs(name, copy, split or "test", "name", "subgroup")
    return dataclasses.replace(dataset, templates=[PLACE])  # as in training: the bare name


def _scenes(name: str, tfds_name: str, path: Path, split: str) -> Dataset:
    """The splits `long` and `long_validation` are of the long descriptions."""
    long_text = split.startswith("long")
    field = "description" if long_text else "sentence"
    dataset = region_sets.open_regions(name, TfdsCopy(tfds_name, str(path)), split, field)
    return dataclasses.replace(dataset, long_text=long_text, templates=[PLACE])


def _joined(name: str, split: str) -> str:
    return "-".join([*name.split("/"), *([split] if split else [])])


def _without_missing(dataset: Dataset, allow_missing: bool) -> Dataset:
    places = dataset.images.places
    there = [not isinstance(place, Path) or place.is_file() for place in places]
    if all(there):
        return dataset
    missing = [str(place) for place, found in zip(places, there, strict=True) if not found]
    if not allow_missing or len(missing) == len(places):
        raise UserError(
            f"{dataset.name}: {len(missing)} of the {len(places)} images listed are not there "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); expected "
            f"{'one or more' if allow_missing else 'all'}"
        )

    def kept(values):
        return [value for value, found in zip(values, there, strict=True) if found]

    image_ids = kept(dataset.image_ids)
    known = set(image_ids)
    texts = [pair for pair in zip(dataset.texts, dataset.text_ids, strict=True) if pair[1] in known]
    return dataclasses.replace(
        dataset,
        images=Images(kept(places), dataset.images.read),
        image_keys=kept(dataset.image_keys),
        image_ids=image_ids,
        texts=[text for text, _ in texts],
        text_ids=[image_id for _, image_id in texts],
        regions=_of_images(dataset.regions, there),
        missing=[k for k, found in zip(dataset.image_keys, there, strict=True) if not found],
    )


def _of_images(regions: Regions | None, there: list[bool]) -> Regions | None:
    """The regions of the images that are there, whose places are counted anew."""
    if regions is None:
        return None
    kept = np.asarray(there)[regions.images]
    chosen = np.flatnonzero(kept).tolist()
    return dataclasses.replace(
        regions,
        images=(np.cumsum(there) - 1)[regions.images[kept]],
        boxes=regions.boxes[kept],
        texts=[regions.texts[i] for i in chosen],
        keys=[regions.keys[i] for i in chosen],
        labels=[regions.labels[i] for i in chosen] if regions.labels else [],
    )


def _stamped(dataset: Dataset) -> Dataset:
    """The data set with its counts in the protocol id where the id alone does not say them."""
    regions = len(dataset.regions) if dataset.regions else 0
    counts = (len(dataset.images), len(dataset.texts), len(dataset.class_names), regions)
    published = PUBLISHED.get(dataset.protocol)
    if not counts[0]:
        raise UserError(f"{dataset.name}: found no image, expected one or more")
    if counts == published:
        return dataset
    sizes = zip(counts, ("images", "texts", "classes", "regions"), strict=True)
    suffix = "-".join(f"{count}-{what}" for count, what in sizes if count)
    partial = "-partial" if published else ""
    return dataclasses.replace(dataset, protocol=f"{dataset.protocol}{partial}-{suffix}")
