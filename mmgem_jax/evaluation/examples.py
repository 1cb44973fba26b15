"""What an evaluation reads: encoded images, texts and labels, however they are stored.

Annotations are read at once and checked; of the images only the places are held, and their bytes
are read one image at a time.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from mmgem_jax.data import images
from mmgem_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Images(Sequence):
    """Encoded images by index: `read` gives the bytes of the one at a place."""

    places: Sequence  # of each image: a path, a part of a tar file, the row of a TFDS split
    read: Callable[[Any], bytes] = Path.read_bytes

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        return self.read(self.places[index])


@dataclasses.dataclass(frozen=True)
class Regions:
    """Boxes of a data set's images, each with one text, in the order of the images."""

    images: np.ndarray  # int [N], which image each is of
    boxes: np.ndarray  # fp32 [N, 4] as x0, y0, x1, y1, shares of the whole image
    texts: list[str]  # N
    keys: list  # published id of each, all different
    labels: list[int] = dataclasses.field(default_factory=list)  # class of each, or []
    class_names: list[str] = dataclasses.field(default_factory=list)

    def __len__(self):
        return len(self.texts)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a protocol evaluates on, read from local copies in their published formats."""

    name: str  # as on the command line
    protocol: str
    images: Sequence  # images[i] is the encoded bytes of image i
    image_keys: list  # published id or file name of each image
    image_ids: list  # an image and a text are relevant to each other when their ids are equal
    texts: list[str]  # [] where the data set has none
    text_ids: list
    labels: list[int]  # class of each image, [] where there are none
    class_names: list[str]  # the data set's own, [] where there are none
    annotation_hash: str  # sha256 over the annotations, in the order that their reader states
    missing: list = dataclasses.field(default_factory=list)  # keys of listed images not there
    long_text: bool = False  # a protocol that must not truncate
    templates: list[str] = dataclasses.field(default_factory=list)  # the data set's own prompts
    regions: Regions | None = None

    def pixels(self, index: int, size: int) -> np.ndarray:
        """Image `index` as the evaluation sees it, uint8 [size, size, 3].

        Its middle, or where the data set has regions the whole image, so that none falls outside.
        Raises UserError naming the image where its bytes cannot be read or are no whole image.
        """
        try:
            fit = images.resize_and_crop if self.regions is None else images.squash
            return fit(images.decode(self.images[index]), size)
        except UnidentifiedImageError:  # its words are the address of a buffer
            found = "found the bytes of no image"
        except Exception as error:  # Pillow's plug-ins raise all kinds on a broken file
            found = error
        key = self.image_keys[index]
        raise UserError(f"{self.name}: image {key}: {found}; expected a whole image file")


def captioned(
    name: str,
    protocol: str,
    rows: Iterable[tuple],
    annotation_hash: str,
    read: Callable[[Any], bytes] = Path.read_bytes,
    long_text: bool = False,
) -> Dataset:
    """The data set of rows (key, place, texts), every image with texts of its own.

    White space around a text is cut off, as the tokenizers of published protocols do it. Raises
    UserError for an image without a text, and for a text that is empty or no text.
    """
    rows = list(rows)
    texts, text_ids = [], []
    for image_id, (key, _, captions) in enumerate(rows):
        if not captions:
            raise UserError(f"{name}: image {key} has no caption, expected one or more")
        for caption in captions:
            if not isinstance(caption, str) or not caption.strip():
                raise UserError(f"{name}: image {key}: caption {caption!r}; expected a text")
            texts.append(caption.strip())
            text_ids.append(image_id)
    return Dataset(
        name=name,
        protocol=protocol,
        images=Images([place for _, place, _ in rows], read),
        image_keys=[key for key, _, _ in rows],
        image_ids=list(range(len(rows))),
        texts=texts,
        text_ids=text_ids,
        labels=[],
        class_names=[],
        annotation_hash=annotation_hash,
        long_text=long_text,
    )


def labelled(
    name: str,
    protocol: str,
    rows: Iterable[tuple],
    class_names: list[str],
    annotation_hash: str,
    read: Callable[[Any], bytes] = Path.read_bytes,
    templates: Sequence[str] = (),
) -> Dataset:
    """The data set of rows (key, place, label), a label being an index into the class names.

    Raises UserError for a label that has no name, unless there are no names at all.
    """
    rows = list(rows)
    for key, _, label in rows:
        if label < 0 or (class_names and label >= len(class_names)):
            known = f"0 to {len(class_names) - 1}" if class_names else "0 or above"
            raise UserError(f"{name}: image {key}: label {label}, expected {known}")
    return Dataset(
        name=name,
        protocol=protocol,
        images=Images([place for _, place, _ in rows], read),
        image_keys=[key for key, _, _ in rows],
        image_ids=list(range(len(rows))),
        texts=[],
        text_ids=[],
        labels=[label for _, _, label in rows],
        class_names=list(class_names),
        annotation_hash=annotation_hash,
        templates=list(templates),
    )
