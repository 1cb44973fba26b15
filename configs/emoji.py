"""Emoji drawings and their names: minutes on two CPU cores, one unseen vendor as the test.

python -m mmgem_jax.train --config configs/emoji.py --workdir workdirs/emoji
"""

from base import get_config as base_config
from base import group


def get_config():
    """A small MM-GEM from scratch on the THINGS drawings."""
    config = base_config()
    config.steps = 1000
    config.batch_size = 128
    config.average_decay = 0.99

    config.model.joint_dim = 128
    config.model.embedding_grid = 3
    config.model.generation_grid = 3
    config.model.image_mean = (0.5, 0.5, 0.5)
    config.model.image_std = (0.5, 0.5, 0.5)
    vision = config.model.vision
    vision.image_size, vision.patch_size = 48, 8
    vision.width, vision.depth, vision.heads, vision.mlp = 128, 4, 4, 512
    vision.dtype, vision.remat, vision.activation = "float32", "none", "quick_gelu"
    vision.unroll = 4
    decoder = config.model.decoder
    decoder.width, decoder.depth, decoder.heads, decoder.kv_heads = 128, 3, 4, 2
    decoder.head_dim, decoder.mlp, decoder.tie_embeddings = 32, 384, True
    decoder.dtype, decoder.remat = "float32", "none"
    decoder.unroll = 3

    config.loss.embedding_weight = 0.25  # captions learn faster than with 0.5, retrieval alike
    config.optimizer.warmup_steps = 50
    # Strong decay: each concept is drawn a handful of times, and a drawing is learned by heart.
    config.optimizer.groups = {
        "decoder": group("decoder/.*kernel", "muon", 0.04, 0.3),
        "vision": group("(vision|.*_projection)/.*kernel", "muon", 0.02, 0.3),
        "rest": group("(?!.*kernel).*", "adamw", 6e-3, 0.0),
    }

    config.data.name = "emoji/things"
    # Settings were chosen with data.split=train, on the validation vendor.
    config.data.split = "train+validation"
    config.data.text_templates = (
        "{name}",
        "{name}, {keywords}",
        "{subgroup}: {name}",
        "{keywords}",
        "{subgroup}",
    )
    config.data.text_weights = (0.55, 0.15, 0.1, 0.1, 0.1)
    config.data.caption_template = "{name}"
    config.data.text_length = 12
    config.data.caption_length = 10
    config.data.workers = 1
    augment = config.data.augment
    augment.min_scale, augment.max_scale, augment.shift = 0.8, 1.2, 0.07
    augment.stretch, augment.rotate, augment.colour, augment.background = 0.15, 10.0, 0.2, 0.3

    config.eval.every = 250
    config.eval.pixel_floor = True
    config.eval.splits = ("unseen_validation",)
    config.eval.final_splits = ("test", "unseen")
    config.eval.sample_split = "test"
    config.eval.caption_field = "name"
    config.eval.class_field = "subgroup"
    config.checkpoint.every = 250
    config.log.every = 20
    return config
