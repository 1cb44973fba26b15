"""Stage 2 on emoji scenes: regions and their texts, mixed with the drawings of stage 1.

python tools/build_scenes.py --data_dir data
python -m mmgem_jax.train --config configs/emoji_regions.py --workdir workdirs/emoji_regions \
    --config.init_from=workdirs/emoji
"""

from emoji import get_config as emoji_config
from ml_collections import ConfigDict


def get_config():
    """The model of configs/emoji.py, on images of twice the size."""
    config = emoji_config()
    config.init_from = "workdirs/emoji"
    config.steps = 1000
    config.batch_size = 64
    config.model.vision.image_size = 96  # a drawing in a scene is as large as a whole one was

    config.optimizer.groups.decoder.learning_rate = 0.015
    config.optimizer.groups.vision.learning_rate = 0.0075
    config.optimizer.groups.rest.learning_rate = 2e-3
    return with_scenes(config, "things")


def with_scenes(config, drawings):
    """A config of stage 1 on emoji drawings with the data of stage 2."""
    pairs = dict(
        weight=2.0,
        name=config.data.name,
        split=config.data.split,
        regions_field="",
        text_templates=config.data.text_templates,
        text_weights=config.data.text_weights,
        caption_template=config.data.caption_template,
        text_length=config.data.text_length,
        caption_length=config.data.caption_length,
    )
    scenes = dict(
        weight=1.0,
        regions_field="",
        text_templates=("{sentence}", "{description}"),
        text_weights=(0.5, 0.5),
        caption_template="{sentence}",
        augment=dict(rotate=0.0, min_scale=0.9, max_scale=1.1),  # left stays left
    )
    regions = dict(
        weight=2.0,
        whole_image=False,
        text_length=config.data.text_length,
        caption_length=config.data.caption_length,
        augment=dict(rotate=5.0, min_scale=0.7, max_scale=1.2),
    )
    config.data.name = f"emoji_scenes/{drawings}"
    config.data.split = "train"
    config.data.regions_field = "regions"
    config.data.max_regions = 6
    # Tokens: the longest descriptions and sentences that tools/build_scenes.py makes, uncut.
    config.data.text_length = 272
    config.data.caption_length = 72
    config.data.mixture = ConfigDict(dict(regions=regions, scenes=scenes, drawings=pairs))

    # These scenes are new, but stage 1 has been trained on the drawings in them; only those of the
    # split test are of a vendor that neither stage has seen.
    config.eval.splits = ("validation",)
    config.eval.final_splits = ("test",)
    config.eval.sample_split = ""  # tools/visualize.py draws regions
    config.eval.caption_field = "sentence"
    config.eval.class_field = ""
    config.eval.pixel_floor = False
    config.eval.every = config.steps // 2
    config.checkpoint.every = 10 * config.log.every
    return config
