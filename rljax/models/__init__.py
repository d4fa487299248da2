"""Model families. To add one: a module like llama.py, a line here, and a parity test."""

from rljax.models import llama, mistral, qwen2, qwen3
from rljax.models.decoder import Family
from rljax.models.hf_config import ModelFolderError

# The name is config.json's model_type.
FAMILIES: dict[str, Family] = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}

__all__ = ["FAMILIES", "ModelFolderError"]
