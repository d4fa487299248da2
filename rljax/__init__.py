"""rljax: post-training of language models by reinforcement learning in JAX."""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch is how it should be

__version__ = "0.1.0"
