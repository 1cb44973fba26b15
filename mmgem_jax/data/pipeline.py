"""Disk to batches: any of the sources, alone or mixed, padded or packed, through grain.

The order of the examples depends on the seed alone: every process takes its share of the same
batches, and the iterator's position, a count of batches, is saved with the checkpoint; of packed
rows (packed_batches.py) those of its streams are too.
"""

from mmgem_jax.data.counted_batches import CountedBatches
from mmgem_jax.data.packed_batches import PackedBatches, packing_of
from mmgem_jax.data.padded_batches import PaddedBatches
from mmgem_jax.data.sources import open_source, regions_an_image, sources, where_is
from mmgem_jax.data.training_example import TrainingExample


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
      CountedBatches: an iterator of dicts of numpy arrays.

    Raises:
      UserError: data, split, field or template that is not there; weights that do not fit.
    """
    records, examples, weights = {}, {}, []
    for place, (name, data) in enumerate(sources(config.data).items()):
        records[name] = open_source(name, data)
        example = TrainingExample(
            records[name], config.model.vision.image_size, data, tokenizer, place
        )
        # Drawn by an example's place in the sequence of all processes.
        examples[name] = records[name].order(config.seed + place).random_map(example)
        weights.append(data.weight)
    if config.data.packing.images:
        packed = {name: (examples[name], packing) for name, packing in packings(config).items()}
        batches = PackedBatches(packed, weights, config, share, shares)
    else:
        batches = PaddedBatches(list(examples.values()), weights, config, share, shares)
    return CountedBatches(batches, records, config.data, share)


def packings(config):
    """The Packing of every source by its name, or None, where rows are padded; see `packing_of`."""
    return {
        name: packing_of(config, data, regions_an_image(data), where_is(name))
        for name, data in sources(config.data).items()
    }
