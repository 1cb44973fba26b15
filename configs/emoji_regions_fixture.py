"""Stage 2 in seconds, on the few drawings of the tests; it learns nothing worth a look.

python tools/build_emoji.py --config fixture --packages tests/fixture/emoji
python tools/build_scenes.py --config fixture
python -m mmgem_jax.train --config configs/emoji_regions_fixture.py \
    --workdir workdirs/emoji_regions_fixture --config.init_from=workdirs/emoji_fixture
"""

from emoji_fixture import get_config as fixture_config
from emoji_regions import with_scenes


def get_config():
    """configs/emoji_regions.py, made very small: every part of it runs."""
    config = with_scenes(fixture_config(), "fixture")
    config.init_from = "workdirs/emoji_fixture"
    config.model.vision.image_size = 48
    return config
