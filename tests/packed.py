"""Batches of packed rows that tests make from padded ones."""

import numpy as np
import tiny

from mmgem_jax.data.broken import CAUSES
from mmgem_jax.data.packing import FOR_THE_HOST, Packing, assemble, candidate_of, plan_group

SIZES = {"images": 4, "rows": 7, "row_length": 20, "targets": 40, "text_rows": 0, "waiting": 1}


def packing(**changes):
    """The sizes of a group of 4 images of the tiny config, of 2 regions each."""
    grid = tiny.SIZES["model.generation_grid"]
    return Packing(**SIZES | changes, visual_tokens=grid**2)


def for_the_host(record):
    """The entries of an example that the model is not given: nothing was skipped."""
    return {
        "record": np.int64(record),
        "skipped": np.zeros(len(CAUSES), np.int32),
        "skipped_record": np.int64(-1),
    }


def packed(batch, sizes):
    """The groups of images that follow each other in a padded batch, as packed rows."""
    groups = []
    for first in range(0, len(batch["image"]), sizes.images):
        rows = range(first, first + sizes.images)
        examples = [{n: x[row] for n, x in batch.items()} | for_the_host(row) for row in rows]
        drawn = iter(
            candidate_of(number, example, sizes.visual_tokens)
            for number, example in enumerate(examples)
        )
        placed, _ = plan_group(sizes, [], lambda drawn=drawn: next(drawn))
        assert len(placed) == sizes.images
        group = assemble(sizes, placed)
        groups.append(group | {"data_position": np.zeros((1, 2), np.int32)})
    names = groups[0].keys() - FOR_THE_HOST.keys()
    return {name: np.concatenate([group[name] for group in groups]) for name in names}
