"""ssa: language models with natively trainable sparse attention."""

__version__ = "0.1.0"
