"""The flagship, stage 2: Visual Genome's region descriptions, mixed with pairs of stage 1.

    python tools/build_regions.py --data_dir DATA --name visual-genome --format visual-genome \
        --annotations VG --images VG --test VG/annotations/test.json
    python -m mmgem_jax.train --config configs/vitl_tinyllama_stage2.py --workdir DIR \
        --config.init_from=STAGE_1 --config.data.dir=DATA --config.data.mixture.pairs.name=NAME
"""

from ml_collections import ConfigDict
from vitl_tinyllama_stage1 import get_config as stage1_config


def get_config():
    """Up to 32,768 regions a step on 256 chips, or 2,048 whole images: four steps in five, one."""
    config = stage1_config()
    config.init_from = "workdirs/stage1"
    config.batch_size = 2_048
    config.steps = 20_000
    for group in config.optimizer.groups.values():
        group.learning_rate /= 2

    pairs = dict(
        weight=1.0,
        name="pairs",
        regions_field="",
        whole_image=True,
    )
    config.data.name = "regions/visual-genome"
    config.data.regions_field = "regions"
    config.data.whole_image = False
    config.data.max_regions = 16
    # Groups of the 8 images of a chip, with room for 92 tokens a region, visual tokens included.
    config.data.packing.images, config.data.packing.row_length = 8, 256
    pairs["packing"] = dict(rows=4, targets=216)
    regions = dict(weight=4.0, text_length=32, caption_length=32)
    regions["packing"] = dict(rows=46, targets=1_792)
    config.data.mixture = ConfigDict(dict(regions=regions, pairs=pairs))

    config.eval.splits = ()
    config.eval.final_splits = ("test",)
    config.eval.caption_field = ""
    return config
