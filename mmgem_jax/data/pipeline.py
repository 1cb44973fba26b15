"""Disk to batches: TFDS data sets in array_record with images and texts or regions, through grain.

The order of the examples depends on the seed alone: every process takes its share of the same
batches, and the iterator's position, a count of batches, is saved with the checkpoint; of packed
rows (packed_batches.py) those of its streams are too.
"""

import math

import grain
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from mmgem_jax.data import images, text
from mmgem_jax.data.packed_batches import PackedBatches, packing_of
from mmgem_jax.data.tokenizer import caption_row, embedding_row
from mmgem_jax.errors import UserError, first_line
from mmgem_jax.models.pooling import WHOLE_IMAGE, good_boxes


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


def regions_an_image(data):
    """R: rows of every image of a source, padding included."""
    return int(data.whole_image) + (data.max_regions if data.regions_field else 0)


def corners(boxes):
    """TFDS's boxes [R, 4] (ymin, xmin, ymax, xmax) as ours: x0, y0, x1, y1."""
    return np.asarray(boxes, np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]


class TrainingExample:
    """One record to one row of a batch (shapes at the top of mmgem_jax/objective.py)."""

    def __init__(self, image_size, data, tokenizer, source=0):
        self.image_size, self.tokenizer, self.source = image_size, tokenizer, np.int32(source)
        # Plain values: looked up for every example, a ConfigDict and a tokenizer's properties cost
        # more than the work between.
        self.pad = tokenizer.pad_token_id
        self.image_field, self.templates = data.image_field, list(data.text_templates)
        self.shares = np.cumsum(data.text_weights) / np.sum(data.text_weights)
        self.caption_template = data.caption_template
        self.text_length, self.caption_length = data.text_length, data.caption_length
        self.augment = images.Augmentation(**data.augment)
        self.whole_image, self.regions_field = data.whole_image, data.regions_field
        self.max_regions, self.min_visible = data.max_regions, data.min_visible
        empty = self.row(WHOLE_IMAGE, "", "")
        self.padding = {name: np.zeros_like(value) for name, value in empty.items()}
        self.rows = regions_an_image(data)

    def __call__(self, record, rng):
        rows = [self.row(*self.draw_whole_image(record, rng))] if self.whole_image else []
        pixels, view = images.augment(
            record[self.image_field],
            self.image_size,
            self.augment,
            rng,
            squashed=bool(self.regions_field),
        )
        counts = (0, 0, 0, 0)
        if self.regions_field:
            regions, counts = self.draw_regions(record[self.regions_field], view, rng)
            rows += [self.row(*region) for region in regions]
        rows += [self.padding] * (self.rows - len(rows))
        columns = {name: np.stack([row[name] for row in rows]) for name in self.padding}
        counts = np.asarray(counts, np.int32)
        return {"image": pixels} | columns | {"region_counts": counts, "source": self.source}

    def draw_whole_image(self, record, rng):
        """Box, text and caption of the whole image."""
        template = self.templates[np.searchsorted(self.shares, rng.random(), side="right")]
        words = text.fill(template, record, rng)
        return WHOLE_IMAGE, words, text.fill(self.caption_template, record, rng)

    def draw_regions(self, regions, view, rng):
        """Box, text and caption of regions of a record that a view of its image shows.

        Returns:
          At most `max_regions` of them, drawn at random; and how many were drawn, over that limit,
          out of the view, and unusable (without a text, or with no box within the image).
        """
        words, boxes = [text.as_text(t).strip() for t in regions["text"]], corners(regions["bbox"])
        usable = good_boxes(boxes) & np.asarray([bool(word) for word in words], bool)
        words, boxes = [w for w, kept in zip(words, usable, strict=True) if kept], boxes[usable]
        boxes, visible = images.boxes_in_view(view, boxes)
        seen = np.flatnonzero(visible >= self.min_visible)
        drawn = rng.permutation(seen)[: self.max_regions]
        over, unseen = len(seen) - len(drawn), len(boxes) - len(seen)
        counts = len(drawn), over, unseen, len(usable) - len(boxes)
        return [(boxes[i], words[i], words[i]) for i in drawn], counts

    def row(self, box, words, caption):
        """The arrays of one region."""
        text_row, embed_index, text_cut = embedding_row(self.tokenizer, words, self.text_length)
        caption_tokens, caption_cut = caption_row(self.tokenizer, caption, self.caption_length)
        return {
            "boxes": np.asarray(box, np.float32),
            "region_mask": np.bool_(True),
            "text_tokens": text_row,
            "embed_index": np.int32(embed_index),
            "caption_tokens": caption_tokens,
            "caption_length": np.int32(np.count_nonzero(caption_tokens != self.pad)),
            "group_ids": np.asarray([text.text_id(caption), text.text_id(words)], np.int32),
            "truncated": np.asarray([text_cut, caption_cut]),
        }


def training_batches(config, tokenizer, share=0, shares=1):
    """An endless, resumable iterator of this process's share of the batches.

    Each batch is of one source: where sources are mixed their rows need no padding to one length,
    and negatives are no easier than the source's own.

    Args:
      config: the whole config.
      tokenizer: from `load_tokenizer`.
      share: which share; one after the other they are the batch, whatever their number.
      shares: how many there are.

    Returns:
      An iterator of dicts of numpy arrays with `get_state`, `set_state` and `close`, as a grain
      DatasetIterator has them. With `data.packing` the state is of this share's streams.

    Raises:
      UserError: data, split, field or template that is not there; weights that do not fit.
    """
    examples, weights = {}, []
    for place, (name, data) in enumerate(sources(config.data).items()):
        records = open_source(name, data)
        example = TrainingExample(config.model.vision.image_size, data, tokenizer, place)
        # Drawn by an example's place in the sequence of all processes.
        ordered = grain.MapDataset.source(records).seed(config.seed + place).shuffle().repeat()
        examples[name] = ordered.random_map(example)
        weights.append(data.weight)
    if config.data.packing.images:
        packed = {name: (examples[name], packing) for name, packing in packings(config).items()}
        return PackedBatches(packed, weights, config, share, shares)
    size = config.batch_size // shares
    mixed = [e.batch(size, drop_remainder=True)[share::shares] for e in examples.values()]
    dataset = mixed[0] if len(mixed) == 1 else grain.MapDataset.mix(mixed, weights)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0))
    if config.data.workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                config.data.workers, per_worker_buffer_size=config.data.prefetch
            )
        )
    return iter(dataset)


def packings(config):
    """The Packing of every source by its name, or None, where rows are padded; see `packing_of`."""
    return {
        name: packing_of(config, data, regions_an_image(data), where_is(name))
        for name, data in sources(config.data).items()
    }


# Fields that a source of a mixture cannot have for itself.
OF_ALL_SOURCES = {"tokenizer", "workers", "prefetch", "mixture"}


def sources(data):
    """The sources of `config.data` by name: those of its mixture, or itself alone under "".

    Raises:
      UserError: a field that there is not, or of another type, or a weight that is not above 0.
    """
    if not data.mixture:
        return {"": data}
    found = {}
    for name, changes in data.mixture.items():
        if shared := sorted(OF_ALL_SOURCES & set(changes)):
            raise UserError(
                f"data.mixture.{name}.{shared[0]}: is for all sources; expected data.{shared[0]}"
            )
        found[name] = data.copy_and_resolve_references()
        try:
            found[name].update(changes)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"data.mixture.{name}: {first_line(error)}") from None
        if not 0 < found[name].weight < math.inf:
            raise UserError(
                f"data.mixture.{name}.weight: {found[name].weight:g}; expected a number above 0"
            )
    return found


def where_is(name):
    """What to call a source in an error."""
    return f"data.mixture.{name}" if name else "data"


def open_source(name, data):
    """The records of a source, after its fields, templates and weights have been checked."""
    where = where_is(name)
    source = open_split(data, data.split, f"{where}.split", where)
    features = find_builder(data, where).info.features
    if not (data.whole_image or data.regions_field):
        raise UserError(
            f"{where}.whole_image: False, and {where}.regions_field empty; expected one of the two"
        )
    for field, least in {"text_length": 3, "caption_length": 3, "max_regions": 1}.items():
        if data[field] < least:
            raise UserError(f"{where}.{field}: {data[field]}; expected at least {least}")
    if not 0 < data.min_visible <= 1:
        raise UserError(f"{where}.min_visible: {data.min_visible:g}; expected above 0, at most 1")
    if data.regions_field:
        check_regions_field(f"{where}.regions_field", data.regions_field, features)
    if not data.whole_image:
        return source
    known = set(features) - {data.image_field, data.regions_field}
    text.check_templates(f"{where}.text_templates", data.text_templates, known)
    text.check_templates(f"{where}.caption_template", [data.caption_template], known)
    weights = data.text_weights
    if len(weights) != len(data.text_templates) or min(weights) < 0 or not sum(weights):
        raise UserError(
            f"{where}.text_weights: found {weights} for {len(data.text_templates)} templates; "
            "expected a weight for each, none below 0 and one above"
        )
    return source


def check_regions_field(field, name, features):
    """Raises UserError where a data set has no list of bbox and text under that name."""
    if name not in features:
        raise UserError(f"{field}: no field {name!r}; there are {sorted(features)}")
    inner = getattr(features[name], "feature", None)
    if not isinstance(inner, tfds.features.FeaturesDict) or not {"bbox", "text"} <= set(inner):
        raise UserError(f"{field}: {name!r} is no list of bbox and text; expected one")
