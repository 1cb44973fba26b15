"""How the cost of a step grows with its work: measured time and memory beside those on paper.

One size at a time goes up from a small base: images a batch, cells of an image, tokens of both
texts, regions of an image. What is compared is the exponent p of cost ~ size^p, the slope on
logarithmic scales over the larger half of the sizes. Time on paper is the model FLOPs; memory on
paper is a gradient for every parameter and the result of every product of the forward pass.
"""

import statistics
from dataclasses import dataclass

import jax
import numpy as np
from measure import OurStep, row, times_in_turns, with_adamw
from ml_collections import ConfigDict

from mmgem_jax import run
from mmgem_jax.errors import UserError
from mmgem_jax.flops import train_flops

ROUNDS = 5
# Two layers a tower, in a loop: they compile in seconds and grow as more would.
BASE = {
    "batch_size": 8,
    "accumulation_steps": 1,
    "data.packing.images": 0,
    "data.regions_field": "",
    "data.whole_image": True,
    "model.vision.depth": 2,
    "model.vision.unroll": 1,
    "model.decoder.depth": 2,
    "model.decoder.unroll": 1,
}


@dataclass(frozen=True)
class Growth:
    """One size that goes up: its values, and the fields of the config that make it such."""

    values: tuple
    fields: object  # function: the config before, a value -> dict from dotted names to values


def whole_cells(config, cells):
    """An image of so many cells, a square number."""
    return {"model.vision.image_size": round(cells**0.5) * config.model.vision.patch_size}


GROWTHS = {
    "images a batch": Growth((16, 32, 64, 128), lambda _, n: {"batch_size": n}),
    "cells of an image": Growth((16, 64, 144, 324), whole_cells),
    "tokens of a text": Growth(
        (16, 32, 64, 128), lambda _, n: {"data.text_length": n, "data.caption_length": n}
    ),
    "regions of an image": Growth(
        (2, 4, 8, 16),
        lambda _, n: {
            "data.regions_field": "regions",
            "data.whole_image": False,
            "data.max_regions": n,
        },
    ),
}


def benchmark_growth(config, plot_path=None):
    """Rows on the exponents of time and memory for each size, and a picture of the curves.

    Args:
      config: of which the widths are taken; no data set is read.
      plot_path: file of the picture; None for no picture.
    """
    base = base_config(config)
    curves = {name: measured(base, growth) for name, growth in GROWTHS.items()}
    rows = []
    for name, curve in curves.items():
        for cost in ("time", "memory"):
            ours, maths = (exponent(curve["size"], curve[key]) for key in (cost, f"paper {cost}"))
            rows.append(row(f"{name}: {cost}", ours, "exponent", maths, "the maths'"))
    if plot_path:
        plot(curves, plot_path)
    return rows


def base_config(config):
    """The small config from which each size goes up, complete."""
    config = with_adamw(config)
    config.data.mixture = ConfigDict()
    config.update_from_flattened_dict(BASE)
    config.model.decoder.vocab_size = config.model.decoder.vocab_size or 2048
    with config.optimizer.unlocked():
        config.optimizer.total_steps = config.steps
    return config


def measured(base, growth):
    """Costs of the step at each value: lists `size`, `time` (s), `memory` (bytes), and on paper."""
    steps = {}
    found = {key: [] for key in ("size", "time", "memory", "paper time", "paper memory")}
    for value in growth.values:
        config = base.copy_and_resolve_references()
        config.update_from_flattened_dict(growth.fields(base, value))
        batch = synthetic_batch(config)
        steps[value] = step = OurStep(config, batch)
        found["size"].append(value)
        found["memory"].append(step.temporary_bytes)
        found["paper time"].append(sum(train_flops(config, batch).values()))
        parameters = sum(x.size for x in jax.tree.leaves(step.params))
        found["paper memory"].append(4 * (parameters + product_numbers(config, batch)))
    times = times_in_turns(steps, ROUNDS)
    return found | {"time": [statistics.median(times[value]) for value in growth.values]}


def synthetic_batch(config):
    """A batch of noise with the shapes of `run.batch_shapes`: full rows, every region real."""
    random, vocabulary = np.random.default_rng(0), config.model.decoder.vocab_size
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in run.batch_shapes(config).items()}
    for name in ("text_tokens", "caption_tokens"):
        batch[name] += random.integers(1, vocabulary, batch[name].shape, dtype=np.int32)
    batch["image"] += random.integers(0, 256, batch["image"].shape, dtype=np.uint8)
    corners = np.sort(random.random((*batch["boxes"].shape[:2], 2, 2)), axis=2)
    batch["boxes"] += corners.reshape(batch["boxes"].shape).astype(np.float32)
    batch["region_mask"] |= True
    batch["embed_index"] += batch["text_tokens"].shape[2] - 1
    batch["caption_length"] += batch["caption_tokens"].shape[2]
    ids = batch["group_ids"]
    batch["group_ids"] = np.arange(ids.size, dtype=ids.dtype).reshape(ids.shape)
    return batch


def product_numbers(config, batch):
    """How many numbers the products of a forward pass make; letters as in mmgem_jax/flops.py."""
    model, vision, decoder = config.model, config.model.vision, config.model.decoder
    B, R, T = batch["text_tokens"].shape
    N, caption = B * R, batch["caption_tokens"].shape[2] - 1
    cells = (vision.image_size // vision.patch_size) ** 2
    S, D, heads = cells + 1, vision.width, decoder.heads * decoder.head_dim
    # Query, key, value, what attention finds, and out; the mlp's two; the scores.
    layer = S * (6 * D + vision.mlp) + vision.heads * S * S
    image = cells * D + vision.depth * layer

    def row_numbers(T):
        kept = 2 * heads + 2 * decoder.kv_heads * decoder.head_dim
        kept += 2 * decoder.width + 2 * decoder.mlp
        return decoder.depth * (T * kept + decoder.heads * T * T)

    grids = model.embedding_grid**2, model.generation_grid**2
    region = sum(grids) * D + grids[1] * decoder.width + 2 * model.joint_dim
    region += row_numbers(T) + row_numbers(grids[1] + caption) + caption * decoder.vocab_size
    return B * image + N * region + N * N


def exponent(sizes, costs):
    """The slope of cost against size on logarithmic scales, over the larger half of the sizes."""
    start = (len(sizes) - 1) // 2
    slope, _ = np.polyfit(np.log(sizes[start:]), np.log(costs[start:]), 1)
    return slope


def plot(curves, path):
    """A picture of the curves: dots measured, a dashed line through the last one as the maths is.

    Raises:
      UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "--plot: matplotlib is not installed; expected it (pip install -e '.[preflight]')"
        ) from None
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    costs = {"time": ("seconds a step", 1), "memory": ("temporaries, MiB", 2**20)}
    for column, places in zip(
        curves.items(), figure.subplots(2, len(curves), squeeze=False).T, strict=True
    ):
        name, curve = column
        for (cost, (label, unit)), axes in zip(costs.items(), places, strict=True):
            found, paper = (np.asarray(curve[key]) / unit for key in (cost, f"paper {cost}"))
            slopes = [exponent(curve["size"], values) for values in (found, paper)]
            axes.loglog(curve["size"], found, "o-", color="#0072B2", label=f"{slopes[0]:.2f}")
            line = paper * found[-1] / paper[-1]
            axes.loglog(curve["size"], line, "--", color="#D55E00", label=f"maths {slopes[1]:.2f}")
            axes.set_xticks(curve["size"], [f"{size:g}" for size in curve["size"]])
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axes.set_xlabel(name)
            axes.set_ylabel(label)
            axes.legend(title="exponent", fontsize=8)
    try:
        figure.savefig(path, dpi=70)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot: {path}: {error}; expected a picture's name") from None
