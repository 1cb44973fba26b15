"""The flagship on long texts: up to 1,024 tokens for both losses, attention by blocks.

    python -m mmgem_jax.train --config configs/vitl_tinyllama_long.py --workdir DIR \
        --config.init_from=STAGE_1 --config.data.dir=DATA --config.data.name=NAME
"""

from vitl_tinyllama_stage1 import get_config as stage1_config


def get_config():
    """Global batch 8,192 on 256 chips: 32 images a chip, half of them with long captions."""
    config = stage1_config()
    config.init_from = "workdirs/stage1"
    config.batch_size = 8_192
    config.steps = 20_000
    config.data.text_length = 1_024
    config.data.caption_length = 1_024
    packing = config.data.packing
    packing.images, packing.rows, packing.row_length, packing.targets = 32, 8, 1_536, 5_056
    packing.waiting = 32  # of so many lengths it takes more to fill rows
    config.model.decoder.attention = "splash"
    config.model.decoder.remat = "projections"  # the kernel keeps its own output
    return config
