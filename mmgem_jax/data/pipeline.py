"""Disk to batches: any TFDS data set in array_record with an image and a text, through grain.

The order of the examples depends on the seed alone: every process takes its share of the same
shuffled sequence, and the iterator's position is saved with the checkpoint.
"""

import grain
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from mmgem_jax.data import images, text
from mmgem_jax.data.tokenizer import caption_row, embedding_row
from mmgem_jax.errors import UserError
from mmgem_jax.models.pooling import WHOLE_IMAGE


def find_builder(config):
    """The TFDS builder of `config.data`, read from its folder.

    Raises:
      UserError: there is no such data set in the folder.
    """
    try:
        # Not tfds.builder: for a data set that TFDS has the code of, such as coco_captions, that
        # wants TensorFlow, and looks for the code's own version of the data alone.
        return read_only_builder.builder_from_files(config.name, data_dir=config.dir)
    except ValueError:  # not a name at all, or nothing of that name
        raise UserError(
            f"data.name: no data set {config.name!r} in data.dir {config.dir!r}; "
            "build it first (for emoji: python tools/build_emoji.py)"
        ) from None


def open_split(config, split, field="data.split"):
    """A split as a random-access source of records, images still encoded.

    Args:
      config: `config.data`.
      split: name of a split.
      field: what to call it in an error.

    Raises:
      UserError: the data set, the split or the image field is missing.
    """
    builder = find_builder(config)
    try:
        builder.info.splits[split]  # TFDS's own notation: train, train+validation, train[:10%]
    except (ValueError, KeyError):
        known = sorted(builder.info.splits)
        raise UserError(
            f"{field}: {config.name} has no split {split!r}; there are {known}"
        ) from None
    if config.image_field not in builder.info.features:
        known = sorted(builder.info.features)
        raise UserError(f"data.image_field: no field {config.image_field!r}; there are {known}")
    decoders = {config.image_field: tfds.decode.SkipDecoding()}
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError:
        found = builder.info.file_format.value
        raise UserError(f"data.name: {config.name} is in {found}; expected array_record") from None


class TrainingExample:
    """One record to one row of a batch (shapes at the top of mmgem_jax/objective.py)."""

    def __init__(self, config, tokenizer):
        data = config.data
        self.image_size = config.model.vision.image_size
        self.tokenizer = tokenizer
        # Plain values: looked up for every example, a ConfigDict and a tokenizer's properties cost
        # more than the work between.
        self.pad = tokenizer.pad_token_id
        self.image_field, self.templates = data.image_field, list(data.text_templates)
        self.shares = np.cumsum(data.text_weights) / np.sum(data.text_weights)
        self.caption_template = data.caption_template
        self.text_length, self.caption_length = data.text_length, data.caption_length
        self.augment = images.Augmentation(**data.augment)

    def __call__(self, record, rng):
        template = self.templates[np.searchsorted(self.shares, rng.random(), side="right")]
        words = text.fill(template, record, rng)
        caption = text.fill(self.caption_template, record, rng)
        text_row, embed_index, text_cut = embedding_row(self.tokenizer, words, self.text_length)
        caption_tokens, caption_cut = caption_row(self.tokenizer, caption, self.caption_length)
        pixels = images.augment(record[self.image_field], self.image_size, self.augment, rng)
        length = np.count_nonzero(caption_tokens != self.pad)
        return {
            "image": pixels,
            "boxes": np.asarray([WHOLE_IMAGE], np.float32),
            "region_mask": np.ones(1, bool),
            "text_tokens": text_row[None],
            "embed_index": np.asarray([embed_index], np.int32),
            "caption_tokens": caption_tokens[None],
            "caption_length": np.asarray([length], np.int32),
            "group_ids": np.asarray([[text.text_id(caption), text.text_id(words)]], np.int32),
            "truncated": np.asarray([[text_cut, caption_cut]]),
        }


def training_batches(config, tokenizer, process_index=0, process_count=1):
    """An endless, resumable iterator of this process's share of the batches.

    Args:
      config: the whole config.
      tokenizer: from `load_tokenizer`.
      process_index: which share; row i of all shares' sequence is in share i % process_count.
      process_count: how many shares.

    Returns:
      A grain DatasetIterator of dicts of numpy arrays.

    Raises:
      UserError: data, split, field or template that is not there; weights that do not fit.
    """
    data = config.data
    source = open_split(data, data.split)
    known = set(find_builder(data).info.features) - {data.image_field}
    text.check_templates("data.text_templates", data.text_templates, known)
    text.check_templates("data.caption_template", [data.caption_template], known)
    weights = data.text_weights
    if len(weights) != len(data.text_templates) or min(weights) < 0 or not sum(weights):
        raise UserError(
            f"data.text_weights: found {weights} for {len(data.text_templates)} templates; "
            "expected a weight for each, none below 0 and one above"
        )
    dataset = (
        grain.MapDataset.source(source)
        .seed(config.seed)
        .shuffle()
        .repeat()
        # Before the share is taken: drawn by an example's place in the sequence of all processes.
        .random_map(TrainingExample(config, tokenizer))[process_index::process_count]
        .batch(config.batch_size // process_count, drop_remainder=True)
        .to_iter_dataset(grain.ReadOptions(num_threads=0))
    )
    if data.workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(data.workers, per_worker_buffer_size=data.prefetch)
        )
    return iter(dataset)
