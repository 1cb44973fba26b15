"""The emoji run with a pretrained decoder, SmolLM2-135M, and its own tokenizer.

    python tools/import_hf.py --config configs/emoji_smollm2.py --decoder FILE.gguf \
        --out workdirs/smollm2
    python -m mmgem_jax.train --config configs/emoji_smollm2.py --workdir workdirs/emoji_smollm2
"""

from base import group
from emoji import get_config as emoji_config


def get_config():
    """The vision tower and the projections from scratch, beside the pretrained decoder."""
    config = emoji_config()
    config.init_from = "workdirs/smollm2"
    decoder = config.model.decoder
    decoder.width, decoder.depth, decoder.heads, decoder.kv_heads = 576, 30, 9, 3
    decoder.head_dim, decoder.mlp, decoder.rope_theta = 64, 1536, 100_000.0
    decoder.unroll = 1
    config.optimizer.groups = {
        "decoder": group("decoder/.*", "frozen", 0.0, 0.0),
        "vision": group("(vision|.*_projection)/.*kernel", "muon", 0.02, 0.3),
        "rest": group("(?!decoder/)(?!.*kernel).*", "adamw", 6e-3, 0.0),
    }
    return config
