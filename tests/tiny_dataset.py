"""A tiny data set in a Dataset's fields: coloured squares with two captions and a class each."""

import io

import numpy as np
from PIL import Image

from mmgem_jax.evaluation import tasks
from mmgem_jax.evaluation.examples import Dataset

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


def evaluate(engine, params, dataset, asked):
    """Metrics, how the captions were scored, and the predictions."""
    predictions = tasks.predict(engine, params, dataset, asked)
    return *tasks.score(engine, params, dataset, asked, predictions), predictions
