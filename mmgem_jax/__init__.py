"""MM-GEM in JAX: one vision transformer and one decoder LLM that embeds and captions."""

__version__ = "0.1.0"
