"""What an export is compared on: a few images and texts, of the run's own data or given."""

import dataclasses
from pathlib import Path

from mmgem_jax.data import images
from mmgem_jax.data.text import as_text
from mmgem_jax.data.tfds_records import open_split
from mmgem_jax.errors import UserError

SAMPLES = 8  # images, and texts, of the run's data set


@dataclasses.dataclass(frozen=True)
class Samples:
    """What both frameworks are shown."""

    images: list[bytes]  # encoded
    texts: list[str]
    source: str  # where they are from, for the record


def run_samples(config):
    """The first images and captions of the run's own data: of its first final split.

    Args:
      config: a run's config.

    Raises:
      UserError: the data are not there.
    """
    data, options = config.data, config.eval
    split = options.final_splits[0] if options.final_splits else data.split
    if not data.name:
        raise UserError(
            "data.name: the run has none; expected --images and --texts, or --no-verify"
        )
    try:
        source = open_split(data, split)
        records = [source[i] for i in range(min(SAMPLES, len(source)))]
        texts = [as_text(record[options.caption_field]) for record in records]
    except UserError as error:
        raise UserError(f"{error}; or pass --images and --texts, or --no-verify") from None
    except KeyError:
        raise UserError(
            f"eval.caption_field: {data.name} has no field {options.caption_field!r}; expected "
            "--images and --texts, or --no-verify"
        ) from None
    return Samples([record[data.image_field] for record in records], texts, f"{data.name} {split}")


def given_samples(files, texts):
    """Images of files, and texts; UserError for a file that is no image."""
    encoded = []
    for file in files:
        try:
            encoded.append(Path(file).read_bytes())
            images.decode(encoded[-1])
        except Exception as error:  # Pillow's plug-ins raise all kinds on a broken file
            found = getattr(error, "strerror", None) or "found no whole image"
            raise UserError(f"--images {file}: {found}; expected an image file") from None
    return Samples(encoded, list(texts), "given")


def need(what, found):
    """Raises UserError where there are no images, or no texts."""
    if not found:
        raise UserError(f"--{what}: found none; expected one or more, or --no-verify")
