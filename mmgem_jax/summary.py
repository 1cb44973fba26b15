"""What is printed before a run begins: one screen."""

import jax
import numpy as np

from mmgem_jax.chips import chip_of
from mmgem_jax.data.sources import sources
from mmgem_jax.flops import train_flops
from mmgem_jax.run import batch_shapes


def describe_source(name, data):
    """One line on a source of a config's data."""
    rows = "whole images" if data.whole_image else ""
    if data.regions_field:
        rows += f"{' and ' if rows else ''}up to {data.max_regions} regions an image"
    drawn = f"{name}, weight {data.weight:g}: " if name else ""
    lengths = f"text {data.text_length}, caption {data.caption_length} tokens"
    return f"{drawn}{data.name}, split {data.split}, {rows}, {lengths}"


def peak_flops(config, mesh):
    """Peak FLOP/s of a device of the mesh; 0 where it is not known."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return config.log.peak_flops or (chip.flops if chip else 0)


def describe_flops(config, mesh):
    """One line on the model FLOPs of a step, and the peak of a device."""
    parts = train_flops(config, batch_shapes(config))
    total, peak = sum(parts.values()), peak_flops(config, mesh)
    large = {part: flops / total for part, flops in parts.items() if flops > 0.005 * total}
    shares = ", ".join(f"{part} {share:.0%}" for part, share in large.items())
    of_peak = f"; at most {peak / 1e12:,.0f} TFLOP/s a device" if peak else ""
    return f"{total:.3g} a step, {total / config.batch_size:.3g} an image: {shares}{of_peak}"


def describe_batch(config):
    """One line on how batches are made and worked through."""
    images, parts = config.data.packing.images, config.accumulation_steps
    line = f"{config.batch_size:,} images, made by at most {config.data.workers} worker(s)"
    line += f", packed in groups of {images}" if images else ""
    return line + (f", in {parts} parts" if parts > 1 else "")


def summary(config, mesh, abstract, start):
    """One screen on what is about to run."""
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    bytes_a_device = sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract)
    )
    towers = ", ".join(f"{name} {count(tree):,}" for name, tree in abstract.params.items())
    model, device = config.model, mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    capacity = f" of {chip.hbm / 2**20:,.0f}" if chip else ""
    side = model.vision.image_size // model.vision.patch_size
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    grids = f"embedding {model.embedding_grid}x{model.embedding_grid}"
    grids += f", generation {model.generation_grid}x{model.generation_grid}"
    steps = f"{config.steps:,}" + (f", resumed at {start:,}" if start else "")
    of_sources = [describe_source(*source) for source in sources(config.data).items()]
    lines = {
        "devices": f"{mesh.size} x {device.device_kind}, mesh {axes}, "
        f"{jax.process_count()} process(es)",
        "parameters": f"{count(abstract.params):,}: {towers}",
        "FLOPs": describe_flops(config, mesh),
        "state": f"{bytes_a_device / 2**20:,.1f} MiB a device{capacity}",
        "grids": f"{grids} over a {side}x{side} map",
        "data": f"\n{'':12s}".join(of_sources),
        "batch": describe_batch(config),
        "loss": f"{config.loss.embedding_weight:g} L_Emb + {config.loss.generation_weight:g} L_Gen",
        "steps": steps,
    }
    return "\n".join(f"{name:12s}{value}" for name, value in lines.items())
