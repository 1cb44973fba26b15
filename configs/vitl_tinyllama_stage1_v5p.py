"""The flagship, stage 1, on v5p: a larger batch, parameters over 8 chips, gathers beside compute.

python tools/preflight.py --config configs/vitl_tinyllama_stage1_v5p.py --topology v5p:8x8x4
"""

from vitl_tinyllama_stage1 import get_config as stage1_config


def get_config():
    """Global batch 32,768 on 256 chips: 128 images a chip."""
    config = stage1_config()
    config.batch_size = 32_768
    packing = config.data.packing
    packing.images, packing.rows, packing.row_length, packing.targets = 64, 27, 256, 1_376
    config.model.vision.remat = "attention"  # there is memory for queries, keys and values
    config.mesh.fsdp = 8
    with config.tpu_options.unlocked():
        config.tpu_options.xla_tpu_scoped_vmem_limit_kib = 65_536
        # On v5e the compiler lets gathers run beside matrix products by itself.
        config.tpu_options.xla_enable_async_all_gather = True
        config.tpu_options.xla_tpu_enable_async_collective_fusion = True
        config.tpu_options.xla_tpu_enable_async_collective_fusion_fuse_all_gather = True
        config.tpu_options.xla_tpu_enable_async_collective_fusion_multiple_steps = True
        config.tpu_options.xla_tpu_overlap_compute_collective_tc = True
    return config
