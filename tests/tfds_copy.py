"""Tiny TFDS data sets that TFDS itself writes."""

import contextlib
import io

import tensorflow_datasets as tfds
from pictures import encoded


class Copy(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
    """Writes records that are given, as any builder would, without TensorFlow."""

    def _split_generators(self, dl_manager):
        return {name: iter(rows) for name, rows in self._split_datasets.items()}


def write_copy(folder, name, features, file_format="array_record", **splits):
    """Writes the set `name` or `name/config`: rows (number of the image, record) by split."""
    name, _, config = name.partition("/")
    builder = Copy(
        name=name,
        config=tfds.core.BuilderConfig(name=config) if config else None,
        version="1.1.0",
        features=tfds.features.FeaturesDict({"image": tfds.features.Image()} | features),
        split_datasets={
            split: [(i, {"image": io.BytesIO(encoded(i))} | row) for i, row in rows]
            for split, rows in splits.items()
        },
        data_dir=folder,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format=file_format, download_dir=folder / "downloads")
