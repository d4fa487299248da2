"""rljax: post-training of language models by reinforcement learning in JAX."""

__version__ = "0.1.0"
