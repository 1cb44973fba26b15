"""The emoji run with a pretrained decoder, the first layers of SmolLM2-135M, and its tokenizer.

    python tools/import_hf.py --config configs/emoji_smollm2.py --cut_layers --decoder FILE.gguf \
        --out workdirs/smollm2
    python -m mmgem_jax.train --config configs/emoji_smollm2.py --workdir workdirs/emoji_smollm2
"""

from base import group
from emoji import get_config as emoji_config


def get_config():
    """The vision tower and the projections from scratch, beside the pretrained decoder."""
    config = emoji_config()
    config.init_from = "workdirs/smollm2"
    config.steps = 300  # about 20 minutes on two CPU cores
    decoder = config.model.decoder
    # 8 layers of its 30, trained: in the first minutes their losses fall far faster than with all
    # 30 frozen, which costs more a step.
    decoder.width, decoder.depth, decoder.heads, decoder.kv_heads = 576, 8, 9, 3
    decoder.head_dim, decoder.mlp, decoder.rope_theta = 64, 1536, 100_000.0
    decoder.unroll = 8
    config.optimizer.warmup_steps = 30
    config.optimizer.groups = {
        "decoder": group("decoder/.*", "adamw", 1e-3, 0.1),
        "vision": group("(vision|.*_projection)/.*kernel", "muon", 0.02, 0.3),
        "rest": group("(?!decoder/)(?!.*kernel).*", "adamw", 6e-3, 0.0),
    }
    return config
