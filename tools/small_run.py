"""A run so small that it starts in seconds, with drawings of its own; of all kinds of state."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmgem_jax import command_line
from mmgem_jax.data import pairs

BASE = Path(__file__).parents[1] / "configs" / "base.py"
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("square", "circle", "star", "line")

# Two sources and packed rows: what has most to remember. All is written after every step.
CHANGES = {
    "batch_size": 8,
    "average_decay": 0.9,
    "mesh.data": 1,
    "model.joint_dim": 16,
    "model.embedding_grid": 2,
    "model.generation_grid": 2,
    "optimizer.warmup_steps": 2,
    "data.name": "pairs",
    "data.text_length": 12,
    "data.caption_length": 12,
    "data.workers": 0,
    "data.augment.min_scale": 0.7,
    "data.augment.colour": 0.3,
    "data.packing.images": 4,
    "data.packing.rows": 5,
    "data.packing.row_length": 28,
    "data.packing.targets": 44,
    "data.packing.waiting": 3,
    "log.every": 1,
    "checkpoint.every": 1,
}
TOWERS = {
    "vision": {"image_size": 16, "patch_size": 4, "width": 16, "heads": 2, "mlp": 32},
    "decoder": {"width": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 32},
}
SOURCES = {"plain": {}, "said": {"text_templates": ("a picture of a {caption}",), "weight": 0.5}}


def small_run(folder, steps):
    """The config of a run of so many steps, on drawings that it makes in the folder.

    The programs that it compiles are kept there too, so that a start takes few seconds.
    """
    noise = np.random.default_rng(0)
    captions = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    lines = []
    for number, caption in enumerate(captions):
        pixels = noise.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": caption}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    pairs.build(folder / "data", {"train": folder / "train.jsonl"}, vocab_size=300)

    config = command_line.load_config_file(str(BASE))
    own = {"steps": steps, "data.dir": str(folder / "data"), "compile_cache": str(folder / "cache")}
    config.update_from_flattened_dict(CHANGES | own)
    for tower, sizes in TOWERS.items():
        plain = {"depth": 1, "dtype": "float32", "remat": "none"}
        config.model[tower].update(sizes | plain)
    with config.data.mixture.unlocked():
        config.data.mixture.update(SOURCES)
    return config
