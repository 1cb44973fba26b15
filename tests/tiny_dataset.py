"""A tiny data set in a Dataset's fields: coloured squares with two captions and a class each."""

import io

import numpy as np
from PIL import Image

from mmgem_jax.evaluation import tasks
from mmgem_jax.evaluation.examples import Dataset, Regions

COLOURS = ("red", "green", "blue", "grey", "white", "black", "brown")
CLASSES = ("hat", "cup", "shoe")


class Opened:
    """Images that say which of them were opened."""

    def __init__(self, encoded):
        self.encoded, self.opened = encoded, []

    def __len__(self):
        return len(self.encoded)

    def __getitem__(self, place):
        self.opened.append(int(place))
        return self.encoded[place]


def png(seed, side=32):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def dataset(count=7, captions=2, **changes):
    """`count` images, `captions` texts of each, three classes."""
    words = ("a {} {}", "the {} {} stands here", "{} {}")
    texts, text_ids = [], []
    for image in range(count):
        for template in words[:captions]:
            texts.append(template.format(COLOURS[image % 7], CLASSES[image % 3]))
            text_ids.append(image)
    fields = {
        "name": "made",
        "protocol": "made-v1",
        "images": Opened([png(seed) for seed in range(count)]),
        "image_keys": [f"{image}.png" for image in range(count)],
        "image_ids": list(range(count)),
        "texts": texts,
        "text_ids": text_ids,
        "labels": [image % 3 for image in range(count)],
        "class_names": list(CLASSES),
        "annotation_hash": "0" * 64,
        "missing": [],
        "long_text": False,
    }
    return Dataset(**fields | changes)


def regions(counts=(2, 3, 1, 0, 5, 2, 4), seed=0):
    """So many regions of each image, of random boxes; 7 texts that they share, three classes."""
    rng = np.random.default_rng(seed)
    images = np.repeat(np.arange(len(counts)), counts)
    low = rng.uniform(0, 0.6, (len(images), 2))
    boxes = np.concatenate([low, low + rng.uniform(0.2, 0.4, low.shape)], axis=1)
    kinds = rng.integers(0, 7, len(images)).tolist()
    return Regions(
        images=images,
        boxes=boxes.astype(np.float32),
        texts=[f"a {COLOURS[kind]} {CLASSES[kind % 3]}" for kind in kinds],
        keys=[f"{image}/{row}" for row, image in enumerate(images.tolist())],
        labels=[kind % 3 for kind in kinds],
        class_names=list(CLASSES),
    )


def evaluate(engine, params, dataset, asked):
    """Metrics, how the captions were scored, and the predictions."""
    predictions = tasks.predict(engine, params, dataset, asked)
    return *tasks.score(engine, params, dataset, asked, predictions), predictions
