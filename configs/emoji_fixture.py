"""A whole run in seconds, on the few drawings of the tests; it learns nothing worth a look.

python tools/build_emoji.py --config fixture --packages tests/fixture/emoji
python -m mmgem_jax.train --config configs/emoji_fixture.py --workdir workdirs/emoji_fixture
"""

from emoji import get_config as emoji_config


def get_config():
    """configs/emoji.py, made very small: every part of it runs."""
    config = emoji_config()
    config.steps = 10
    config.batch_size = 16
    config.average_decay = 0.9

    config.model.joint_dim = 32
    config.model.embedding_grid = 2
    config.model.generation_grid = 2
    vision = config.model.vision
    vision.image_size, vision.patch_size = 32, 8
    vision.width, vision.depth, vision.heads, vision.mlp, vision.unroll = 32, 2, 2, 64, 2
    decoder = config.model.decoder
    decoder.width, decoder.depth, decoder.heads, decoder.kv_heads = 32, 2, 4, 2
    decoder.head_dim, decoder.mlp, decoder.unroll = 16, 64, 2

    config.optimizer.warmup_steps = 2
    config.data.name = "emoji/fixture"
    config.data.split = "train"
    config.data.workers = 0

    config.eval.every = 4
    config.eval.batch_size = 16
    config.eval.splits = ("validation", "unseen_validation")
    config.eval.final_splits = ("validation", "test", "unseen", "unseen_validation")
    config.eval.samples = 8
    config.checkpoint.every = 4
    config.log.every = 2
    config.log.conflict_every = 4
    return config
