"""A split read the plain way, beside which the pipeline and the evaluation are held."""

import numpy as np

from mmgem_jax.data import images, text
from mmgem_jax.data.tfds_records import open_split


def read_split(config, split, image_size):
    """A whole split, in memory.

    Returns:
      uint8 images [I, h, w, 3], and the records' other fields, as text, in a list of dicts.
    """
    source = open_split(config, split)
    pixels, records = [], []
    for record in source:
        image = images.decode(record.pop(config.image_field))
        pixels.append(images.resize_and_crop(image, image_size))
        records.append(
            {k: text.as_text(v) for k, v in record.items() if isinstance(v, (bytes, str))}
        )
    return np.stack(pixels), records
