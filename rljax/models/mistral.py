"""Mistral 7B and models of its shape: Llama with sliding-window attention (2310.06825)."""

from rljax.models.decoder import DecoderConfig
from rljax.models.hf_config import ModelFolderError, decoder_fields, hf_fields, refuse
from rljax.models.llama import block, declare_layer, hf_keys

__all__ = ["Config", "block", "declare_layer", "from_hf", "hf_keys", "to_hf"]

Config = DecoderConfig


def from_hf(config: dict) -> Config:
    refuse(config, attention_bias=True, mlp_bias=True)
    if "sliding_window" not in config:
        raise ModelFolderError("config.json of a mistral: the key 'sliding_window' is missing; null means no window")
    return Config(**decoder_fields(config), sliding_window=config["sliding_window"])


def to_hf(config: Config) -> dict:
    names = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return {**names, **hf_fields(config), "sliding_window": config.sliding_window}
