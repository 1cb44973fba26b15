"""The flagship on long texts: up to 1,024 tokens for both losses, attention by blocks.

    python -m mmgem_jax.train --config configs/vitl_tinyllama_long.py --workdir DIR \
        --config.init_from=STAGE_1 --config.data.dir=DATA --config.data.name=NAME
"""

from vitl_tinyllama_stage1 import get_config as stage1_config


def get_config():
    """Global batch 2,048 on 256 chips: 8 images a chip, with more tokens than stage 1's 32."""
    config = stage1_config()
    config.init_from = "workdirs/stage1"
    config.batch_size = 2_048
    config.steps = 20_000
    config.data.text_length = 1_024
    config.data.caption_length = 1_024
    config.model.decoder.attention = "splash"
    config.model.decoder.remat = "projections"  # the kernel's own output would be kept beside
    return config
