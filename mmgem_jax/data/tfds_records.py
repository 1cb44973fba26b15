"""TFDS data sets in array_record as sources of records, without TensorFlow."""

import grain
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from mmgem_jax.data.example_records import UNREADABLE, place, unreadable
from mmgem_jax.errors import UserError


def find_builder(config, where="data"):
    """The TFDS builder of `config.data`, read from its folder.

    Args:
      config: `config.data`, or a source of its mixture.
      where: what to call that in an error.

    Raises:
      UserError: there is no such data set in the folder.
    """
    try:
        # Not tfds.builder: for a data set that TFDS has the code of, such as coco_captions, that
        # wants TensorFlow, and looks for the code's own version of the data alone.
        return read_only_builder.builder_from_files(config.name, data_dir=config.dir)
    except ValueError:  # not a name at all, or nothing of that name
        raise UserError(
            f"{where}.name: no data set {config.name!r} in data.dir {config.dir!r}; build it first "
            "(tools/build_emoji.py, build_scenes.py, build_pairs.py or build_regions.py)"
        ) from None


def open_split(config, split, field="data.split", where="data"):
    """A split as a random-access source of records, images still encoded.

    Args:
      config: `config.data`.
      split: name of a split.
      field: what to call it in an error, and
      where: what to call `config`.

    Raises:
      UserError: the data set, the split or the image field is missing.
    """
    builder = find_builder(config, where)
    try:
        builder.info.splits[split]  # TFDS's own notation: train, train+validation, train[:10%]
    except (ValueError, KeyError):
        known = sorted(builder.info.splits)
        raise UserError(
            f"{field}: {config.name} has no split {split!r}; there are {known}"
        ) from None
    if config.image_field not in builder.info.features:
        known = sorted(builder.info.features)
        raise UserError(f"{where}.image_field: no field {config.image_field!r}; there are {known}")
    decoders = {config.image_field: tfds.decode.SkipDecoding()}
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError:
        found = builder.info.file_format.value
        raise UserError(
            f"{where}.name: {config.name} is in {found}; expected array_record"
        ) from None


class TfdsRecords:
    """A split of a TFDS data set as a source (mmgem_jax/data/sources.py)."""

    def __init__(self, data, where):
        """Raises UserError as `open_split` does, and for a regions field of another form."""
        self.records = open_split(data, data.split, f"{where}.split", where)
        self.name = f"{data.name} {data.split}"
        info = find_builder(data, where).info
        parts, features = info.splits[data.split].file_instructions, info.features
        self.paths, self.counts = [p.filename for p in parts], [p.take for p in parts]
        self.fields = frozenset(features)
        if data.regions_field:
            check_regions_field(f"{where}.regions_field", data.regions_field, features)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, number):
        """One record; Broken where it cannot be read, UserError where its file is gone."""
        try:
            return self.records[number]
        except UNREADABLE as error:
            raise unreadable(error, self.paths[place(number, self.counts)[0]]) from None

    def name_of(self, number):
        """What to call a record in an error."""
        return f"{self.name} record {number}"

    def order(self, seed):
        """An endless MapDataset of record numbers: every epoch all of them, shuffled anew."""
        return grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()


def check_regions_field(field, name, features):
    """Raises UserError where a data set has no list of bbox and text under that name."""
    if name not in features:
        raise UserError(f"{field}: no field {name!r}; there are {sorted(features)}")
    inner = getattr(features[name], "feature", None)
    if not isinstance(inner, tfds.features.FeaturesDict) or not {"bbox", "text"} <= set(inner):
        raise UserError(f"{field}: {name!r} is no list of bbox and text; expected one")
