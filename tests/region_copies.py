"""Tiny copies of region annotations in the formats that they are published in."""

import json

from pictures import encoded, write

WIDTH, HEIGHT = 12, 10  # of every picture

# ---- Visual Genome -------------------------------------------------------------------------------


def vg_region(image, region, x, y, width, height, phrase):
    """A region as in `region_descriptions.json`."""
    return {
        "region_id": region,
        "image_id": image,
        "x": x,
        "y": y,
        "width": width,
        "height": height,
        "phrase": phrase,
    }


def visual_genome(folder, with_sizes=True):
    """Four images in two folders; image 4 has no usable region, image 3 one beside three others."""
    regions = {
        1: [vg_region(1, 11, 0, 0, 12, 10, "the whole"), vg_region(1, 12, 3, 5, 3, 5, " a part ")],
        2: [vg_region(2, 21, -3, 2, 6, 4, "over the left"), vg_region(2, 22, 9, 9, 9, 9, "corner")],
        3: [
            vg_region(3, 31, 3, 2, 0, 5, "no width"),
            vg_region(3, 32, 6, 5, -3, 5, "inverted"),
            vg_region(3, 33, 3, 2, 6, 5, "  "),
            vg_region(3, 34, 6, 0, 6, 5, "kept"),
        ],
        4: [vg_region(4, 41, 12, 0, 4, 4, "beside the image")],
    }
    folders = {1: "VG_100K", 2: "VG_100K_2", 3: "VG_100K", 4: "VG_100K_2"}
    for image, place in folders.items():
        write(folder / place / f"{image}.jpg", encoded(image))
    entries = [{"id": image, "regions": found} for image, found in regions.items()]
    write(folder / "region_descriptions.json", json.dumps(entries))
    if with_sizes:
        data = [
            {
                "image_id": image,
                "width": WIDTH,
                "height": HEIGHT,
                "url": f"https://example.org/people/{place}/{image}.jpg",
                "coco_id": None,
                "flickr_id": None,
            }
            for image, place in folders.items()
        ]
        write(folder / "image_data.json", json.dumps(data))
    return folder


# ---- RefCOCO -------------------------------------------------------------------------------------


def python2_pickle(value):
    """The value as Python 2 pickles it by default, with its 8-bit strings."""
    return _python2(value) + b"."


def _python2(value):
    match value:
        case dict():
            items = (_python2(k) + _python2(v) + b"s" for k, v in value.items())
            return b"(d" + b"".join(items)
        case list():
            return b"(l" + b"".join(_python2(item) + b"a" for item in value)
        case int():
            return b"I%d\n" % value
        case float():
            return b"F%r\n" % value
        case str() if value.isascii():
            return b"S" + repr(value).encode() + b"\n"  # an 8-bit string
        case str():
            return b"V" + value.encode("raw-unicode-escape") + b"\n"  # a unicode string


def ref(number, image, ann, category, split, *sentences):
    """A ref as in `refs(unc).p`, whose file name is not an image's."""
    return {
        "ref_id": number,
        "ann_id": ann,
        "image_id": image,
        "category_id": category,
        "split": split,
        "file_name": f"COCO_train2014_{image:012d}_{ann}.jpg",
        "sent_ids": [number * 10 + place for place in range(len(sentences))],
        "sentences": [
            {
                "raw": sentence.upper(),
                "sent": sentence,
                "tokens": sentence.split(),
                "sent_id": number * 10 + place,
            }
            for place, sentence in enumerate(sentences)
        ],
    }


def refcoco(folder, by="unc"):
    """Two images in `val`, one of them also in `train`, as in Google's splits."""
    refs = [
        ref(1, 500, 51, 18, "train", "the left dog", "dog on the left"),
        ref(2, 500, 52, 1, "val", "caf\u00e9 owner"),
        ref(3, 600, 61, 18, "val", "a dog", "the only dog"),
    ]
    boxes = {
        51: (500, [0, 0, 6, 5.0]),
        52: (500, [6.0, 5.0, 6.0, 5.0]),
        61: (600, [3, 0, 9.01, 10]),
    }
    instances = {
        "info": {},
        "licenses": [],
        "images": [
            {
                "id": image,
                "file_name": f"COCO_train2014_{image:012d}.jpg",
                "width": WIDTH,
                "height": HEIGHT,
            }
            for image in (500, 600)
        ],
        "annotations": [
            {"id": ann, "image_id": image, "bbox": box, "category_id": 18, "segmentation": []}
            for ann, (image, box) in boxes.items()
        ],
        "categories": [
            {"id": 18, "name": "dog", "supercategory": "animal"},
            {"id": 1, "name": "person", "supercategory": "person"},
        ],
    }
    for image in (500, 600):
        path = folder / "train2014" / f"COCO_train2014_{image:012d}.jpg"
        write(path, encoded(image // 100))
    write(folder / "instances.json", json.dumps(instances))
    return write(folder / f"refs({by}).p", python2_pickle(refs))


# ---- COCO-style caption files --------------------------------------------------------------------


def grit(folder):
    """GRiT's `test.json`: an image with all its regions."""
    content = {
        "images": [
            {"id": image, "file_name": f"{image}.jpg", "width": WIDTH, "height": HEIGHT}
            for image in (3, 1)
        ],
        "annotations": [
            {"id": 7, "image_id": 1, "bbox": [0, 0, 6, 5], "caption": "first", "category_id": 1},
            {"id": 8, "image_id": 3, "bbox": [6, 5, 7, 5], "caption": "second", "category_id": 1},
            {"id": 9, "image_id": 1, "bbox": [3, 5, 3, 5], "caption": "first", "category_id": 1},
        ],
        "categories": [{"id": 1, "name": "object"}],
    }
    for image in (3, 1):
        write(folder / "images" / f"{image}.jpg", encoded(image))
    return write(folder / "annotations" / "test.json", json.dumps(content))


def mdetr(folder, captions_in="annotations"):
    """mdetr's file of RefCOCOg's captions: an entry of an image for every expression."""
    rows = [
        (70, 500, [0, 0, 6, 5], "a dog"),
        (71, 600, [3, 0, 9, 10], "a cat"),
        (72, 500, [0, 0, 6, 5], "the dog"),
    ]
    content = {"images": [], "annotations": [], "categories": []}
    for entry, image, box, caption in rows:
        name = f"COCO_train2014_{image:012d}.jpg"
        write(folder / "train2014" / name, encoded(image // 100))
        size = {"width": WIDTH, "height": HEIGHT}
        picture = {"id": entry, "original_id": image, "file_name": name, "caption": caption} | size
        content["images"].append(picture)
        content["annotations"].append({"id": entry, "image_id": entry, "bbox": box})
        if captions_in == "annotations":
            content["annotations"][-1]["caption"] = caption
    return write(folder / "finetune_refcocog_val_captions.json", json.dumps(content))
