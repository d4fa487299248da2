"""Qwen3, dense: Llama with a norm on each query and key head, and its own head width (2505.09388)."""

from typing import Any

from jaxtyping import Array

from rljax.models import llama
from rljax.models.attention import Attend
from rljax.models.decoder import DecoderConfig, HfKey, Params, attention_sublayer, ffn_sublayer
from rljax.models.hf_config import decoder_fields, hf_fields, refuse, refuse_sliding_layers, required
from rljax.models.layers import Param, Rope, rms_norm
from rljax.sharding import Layout

Config = DecoderConfig


def from_hf(config: dict) -> Config:
    refuse(config, attention_bias=True)
    refuse_sliding_layers(config)
    required(config, "head_dim")
    return Config(**decoder_fields(config), sliding_window=None)


def to_hf(config: Config) -> dict:
    names = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    return {**names, **hf_fields(config), "attention_bias": False, "use_sliding_window": False}


def declare_layer(config: Config) -> dict[str, Param]:
    head_norm = Param((config.head_dim,), (None,), "ones")
    return {**llama.declare_layer(config), "q_norm": head_norm, "k_norm": head_norm}


def block(
    config: Config, layout: Layout, w: Params, x: Array, rope: Rope, attend: Attend, cache: Any, layer: Array
) -> tuple[Array, Any]:
    def normed(name: str, heads: Array) -> Array:
        return heads if name == "v" else rms_norm(heads, w[f"{name}_norm"], config.norm_eps)

    x, cache = attention_sublayer(config, layout, w, x, rope, attend, cache, layer, normed)
    return ffn_sublayer(config, layout, w, x), cache


def hf_keys(config: Config) -> dict[str, HfKey]:
    prefix = "model.layers.{layer}.self_attn."
    norms = {f"layers.{name}_norm": HfKey(f"{prefix}{name}_norm.weight", "same") for name in ("q", "k")}
    return {**llama.hf_keys(config), **norms}
