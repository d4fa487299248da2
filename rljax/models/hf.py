"""Hugging Face checkpoints in and out: ``load_config``, ``load_params``, ``save_hf``."""

from rljax.models.hf_config import ModelFolderError
from rljax.models.hf_export import save_hf
from rljax.models.hf_import import load_config, load_params

__all__ = ["ModelFolderError", "load_config", "load_params", "save_hf"]
