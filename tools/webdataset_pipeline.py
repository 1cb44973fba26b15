"""open_clip's training pipeline over WebDataset tars, from the libraries that it is made of.

Stage by stage that of `get_wds_dataset` in its training/data.py (2.24), and its `image_transform`
for training. torchvision, whose own default here is the plain Pillow backend, is replaced by the
few lines of it that run; cleaning by ftfy is left out, in this pipeline's favour.
"""

import math
import random

import numpy as np
import torch
import webdataset
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
AREA = (0.9, 1.0)  # of the crop, as a share of the image
RATIO = (3 / 4, 4 / 3)
TRIES = 10
SHARDS_AT_HAND, FIRST_SHARDS = 2000, 500  # of the shuffle of shards
BUFFER, FIRST_SAMPLES = 5000, 1000  # of the shuffle of samples


def training_pipeline(tars, tokenizer, size, batch_size, length, area=AREA, seed=0):
    """One pass over the tar files, as a worker of its DataLoader makes it.

    Args:
      tars: paths of tar files.
      tokenizer: a fast tokenizer of transformers.
      size: pixels a side of the crops.
      batch_size: examples a batch; a last one that is not full is left out.
      length: tokens of a text, with padding.
      area: range of the crop's share of the image.
      seed: of both shuffles. The crops follow torch's own.

    Returns:
      A webdataset.DataPipeline of batches: fp32 [B, 3, size, size], normalised, and token ids
      int64 [B, length].
    """
    return webdataset.DataPipeline(
        webdataset.SimpleShardList([str(path) for path in tars]),
        webdataset.shuffle(SHARDS_AT_HAND, initial=FIRST_SHARDS, rng=random.Random(seed)),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(handler=webdataset.warn_and_continue),
        webdataset.shuffle(BUFFER, initial=FIRST_SAMPLES, rng=random.Random(seed)),
        webdataset.select(has_image_and_caption),
        webdataset.decode("pilrgb", handler=webdataset.warn_and_continue),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(
            image=lambda image: preprocess(image, size, area),
            text=lambda text: tokenize(tokenizer, text, length),
        ),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(batch_size, partial=False),
    )


def has_image_and_caption(sample):
    """Whether a sample has both."""
    return "txt" in sample and any(kind in sample for kind in ("png", "jpg", "jpeg", "webp"))


def tokenize(tokenizer, text, length):
    """A text's token ids, int64 [length]."""
    found = tokenizer(
        [text], return_tensors="pt", max_length=length, padding="max_length", truncation=True
    )
    return found.input_ids[0]


def preprocess(image, size, area=AREA):
    """A random part of a Pillow image, resized and normalised: fp32 [3, size, size]."""
    image = random_resized_crop(image, size, area).convert("RGB")
    return normalise(to_tensor(image))


def random_resized_crop(image, size, area):
    """A random part of the image, of that share of its area, resized by bicubic interpolation."""
    left, top, width, height = random_part(*image.size, area)
    part = image.crop((left, top, left + width, top + height))
    return part.resize((size, size), Image.Resampling.BICUBIC)


def random_part(width, height, area):
    """Left, top, width and height of a random part; of ten that fall outside, the middle."""
    log_ratio = torch.log(torch.tensor(RATIO))
    for _ in range(TRIES):
        target = width * height * torch.empty(1).uniform_(*area).item()
        ratio = torch.exp(torch.empty(1).uniform_(log_ratio[0], log_ratio[1])).item()
        part = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < part[0] <= width and 0 < part[1] <= height:
            top = torch.randint(0, height - part[1] + 1, size=(1,)).item()
            left = torch.randint(0, width - part[0] + 1, size=(1,)).item()
            return left, top, *part
    if width / height < RATIO[0]:
        part = width, round(width / RATIO[0])
    elif width / height > RATIO[1]:
        part = round(height * RATIO[1]), height
    else:
        part = width, height
    return (width - part[0]) // 2, (height - part[1]) // 2, *part


def to_tensor(image):
    """A Pillow image as fp32 [3, H, W] from 0 to 1."""
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def normalise(pixels):
    """The pixels less CLIP's mean, by its standard deviation."""
    mean, std = (
        torch.as_tensor(values, dtype=pixels.dtype)[:, None, None] for values in (MEAN, STD)
    )
    return pixels.clone().sub_(mean).div_(std)
