"""Decoder families. To add one: a module like llama.py, a line here, a parity test."""

from rljax.models import llama
from rljax.models.hf_config import ModelFolderError

FAMILIES = {"llama": llama}

__all__ = ["FAMILIES", "ModelFolderError"]
