"""MM-GEM in JAX: one vision transformer and one decoder LLM that embeds and captions."""

import os

# transformers gives us tokenizers, which need no PyTorch: its advice to install it is noise.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
