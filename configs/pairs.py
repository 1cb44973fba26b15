"""A small model from scratch on one's own pairs (tools/build_pairs.py), on one device.

python tools/build_pairs.py --data_dir data --train train.jsonl --validation validation.jsonl \
    --vocab_size 8192
python -m mmgem_jax.train --config configs/pairs.py --workdir workdirs/pairs
"""

from emoji import get_config as emoji_config


def get_config():
    """The emoji run's model and optimizer, on larger images and longer texts."""
    config = emoji_config()
    config.steps = 10_000

    vision = config.model.vision
    vision.image_size, vision.patch_size = 64, 8

    config.data.name = "pairs"
    config.data.split = "train"
    config.data.text_templates = ("{caption}",)
    config.data.text_weights = (1.0,)
    config.data.caption_template = "{caption}"
    config.data.text_length = 32
    config.data.caption_length = 32

    config.eval.every = 1_000
    config.eval.splits = ("validation",)
    config.eval.final_splits = ("validation",)
    config.eval.sample_split = "validation"
    config.eval.pixel_floor = False
    config.eval.caption_field = "caption"
    config.eval.class_field = ""
    config.checkpoint.every = 1_000
    config.log.every = 50
    return config
