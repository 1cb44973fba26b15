"""The flagship, stage 1: CLIP ViT-L/14 and TinyLlama-1.1B on image-text pairs.

    python tools/import_hf.py --config configs/vitl_tinyllama_stage1.py --config.mesh.fsdp=1 \
        --vision openai/clip-vit-large-patch14 \
        --decoder TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --out workdirs/vitl_tinyllama
    python -m mmgem_jax.train --config configs/vitl_tinyllama_stage1.py --workdir DIR \
        --config.data.dir=DATA --config.data.name=NAME

Parameters: vision 303,179,776; decoder 1,100,048,384 for TinyLlama's 32,000 tokens, and
2 x 128 x 2,048 more for [EMB], [PAD] and the padding of the vocabulary to 32,128.
"""

from base import get_config as base_config


def get_config():
    """Global batch 20,480 on 256 chips: 80 images a chip."""
    config = base_config()
    config.init_from = "workdirs/vitl_tinyllama"
    config.batch_size = 20_480
    config.steps = 100_000
    config.mesh.data = -1
    config.mesh.fsdp = 16
    for tower in (config.model.vision, config.model.decoder):
        tower.attention = "rows"
    # Queries, keys and values of the vision tower are made again: to keep them takes as long.
    config.model.vision.remat, config.model.decoder.remat = "outputs", "attention"
    # One pass over rows of both kinds: predicted 720 ms a step of v5e:16x16; with text_rows=4 and
    # rows=18, so in two passes, 776 ms. Room for captions of the web: 0.96 of the places are in
    # use, and 0.99 of the images' slots.
    packing = config.data.packing
    packing.images, packing.rows, packing.row_length, packing.targets = 40, 17, 256, 860
    config.model.decoder.vocab_size = 32_128
    # Of VMEM, for one fused operation: more than the compiler's 16 MiB makes larger blocks.
    with config.tpu_options.unlocked():
        config.tpu_options.xla_tpu_scoped_vmem_limit_kib = 32_768
    config.data.augment.min_scale = 0.7
    config.eval.batch_size = 1_024
    config.eval.splits = ("validation",)
    config.eval.final_splits = ("validation",)
    return config
