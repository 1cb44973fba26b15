"""Writing a TFDS data set as array_record, without TensorFlow and without its chatter."""

import contextlib
import io
import tempfile

import tensorflow_datasets as tfds


def write(builder: tfds.core.DatasetBuilder) -> None:
    """Generates all splits of a builder into its folder, which is there only when all is written.

    Raises what the builder's generators raise.
    """
    tfds.disable_progress_bar()
    # tfds announces a download of unknown size (there is none) and wants a folder for it.
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as scratch:
        builder.download_and_prepare(file_format="array_record", download_dir=scratch)
