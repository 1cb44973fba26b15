"""Pairs for timing: JPEGs that cost as much to decode as photos, and captions, in every form.

Pictures are noise whose spectrum falls with frequency as that of photos does, so that blocks of a
JPEG hold about as many coefficients: 0.25 bytes a pixel at 256 pixels a short side and quality 90,
0.19 at 512. Words are made up, and few of them are frequent, as in a language.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

QUALITY = 90
FALL = 1.6  # amplitude ~ 1 / frequency ** FALL
CONTRASTS = (50, 12, 12)  # standard deviations of brightness and of both colours
SHAPES = ((3, 4), (4, 3), (2, 3), (1, 1))  # width to height, of the pictures in turn
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "ol")]
VOCABULARY = 4000
WORDS = (5, 20)  # of a caption
PLACES = 4  # digits of an example's number within its tar file


def write_pairs(folder, count, short_side, seed=0):
    """Writes `count` JPEGs and `train.jsonl` with their captions.

    Args:
      folder: a new one.
      count: of the pictures.
      short_side: of each, in pixels.
      seed: the same gives the same files.

    Returns:
      Path of the JSON-lines file, each line `{"image": PATH, "caption": TEXT}`.
    """
    random = np.random.default_rng(seed)
    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    ground = noise(random, 2 * short_side)
    vocabulary = [
        "".join(random.choice(SYLLABLES, random.integers(1, 4))) for _ in range(VOCABULARY)
    ]
    path = folder / "train.jsonl"
    with path.open("w") as lines:
        for number in range(count):
            name = f"images/{number:09d}.jpg"
            picture = part_of(ground, random, short_side, SHAPES[number % len(SHAPES)])
            picture.save(folder / name, quality=QUALITY)
            caption = caption_of(vocabulary, random)
            lines.write(json.dumps({"image": name, "caption": caption}) + "\n")
    return path


def noise(random, side):
    """A picture of noise that repeats at its edges, YCbCr uint8 [side, side, 3]."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    planes = []
    for contrast in CONTRASTS:
        spectrum = np.fft.rfft2(random.standard_normal((side, side))) / frequency**FALL
        plane = np.fft.irfft2(spectrum, (side, side))
        planes.append(128 + contrast * plane / plane.std())
    return np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)


def part_of(ground, random, short_side, shape):
    """A part of the noise, from anywhere, as an RGB picture of that short side and shape."""
    width, height = (round(short_side * side / min(shape)) for side in shape)
    shifted = np.roll(ground, random.integers(0, len(ground), 2), axis=(0, 1))
    planes = np.ascontiguousarray(shifted[:height, :width])
    return Image.frombytes("YCbCr", (width, height), planes.tobytes()).convert("RGB")


def caption_of(vocabulary, random):
    """A caption, the n-th word of the vocabulary about 1/n as frequent as the first."""
    places = np.exp(
        random.uniform(0, np.log(len(vocabulary)), random.integers(*WORDS, endpoint=True))
    )
    return " ".join(vocabulary[int(place) - 1] for place in places)


def write_tars(pairs, folder, examples):
    """Writes the pairs of a JSON-lines file as img2dataset does its WebDataset output.

    00000.tar holds 000000000.jpg, .json and .txt of the first example, and so on: five digits of
    the tar file and four of the example in it.

    Args:
      pairs: what `write_pairs` gave.
      folder: a new one.
      examples: of a tar file.
    """
    Path(folder).mkdir()
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for shard, first in enumerate(range(0, len(rows), examples)):
        with tarfile.open(Path(folder) / f"{shard:05d}.tar", "w") as archive:
            for place, row in enumerate(rows[first : first + examples]):
                key = f"{shard:05d}{place:0{PLACES}d}"
                encoded = (pairs.parent / row["image"]).read_bytes()
                about = json.dumps(described(row["caption"], key, encoded)).encode()
                add(archive, f"{key}.jpg", encoded)
                add(archive, f"{key}.json", about)
                add(archive, f"{key}.txt", row["caption"].encode())


def described(caption, key, encoded):
    """The fields of img2dataset's .json."""
    width, height = Image.open(io.BytesIO(encoded)).size
    return {
        "caption": caption,
        "url": f"https://example.com/{key}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
    }


def add(archive, name, content):
    """Adds a file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
