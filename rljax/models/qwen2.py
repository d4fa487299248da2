"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values (2407.10671)."""

from typing import Any

from jaxtyping import Array

from rljax.models import llama
from rljax.models.attention import Attend
from rljax.models.decoder import DecoderConfig, HfKey, Params, attention_sublayer, ffn_sublayer
from rljax.models.hf_config import decoder_fields, hf_fields, refuse_sliding_layers
from rljax.models.layers import Param, Rope, add_bias
from rljax.sharding import Layout

Config = DecoderConfig


def from_hf(config: dict) -> Config:
    refuse_sliding_layers(config)
    return Config(**decoder_fields(config), sliding_window=None)


def to_hf(config: Config) -> dict:
    names = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    return {**names, **hf_fields(config), "use_sliding_window": False}


def declare_layer(config: Config) -> dict[str, Param]:
    return {
        **llama.declare_layer(config),
        "q_bias": Param((config.num_heads, config.head_dim), ("heads", None), "zeros"),
        "k_bias": Param((config.num_kv_heads, config.head_dim), ("kv_heads", None), "zeros"),
        "v_bias": Param((config.num_kv_heads, config.head_dim), ("kv_heads", None), "zeros"),
    }


def block(
    config: Config, layout: Layout, w: Params, x: Array, rope: Rope, attend: Attend, cache: Any, layer: Array
) -> tuple[Array, Any]:
    def biased(name: str, heads: Array) -> Array:
        return add_bias(heads, w[f"{name}_bias"])

    x, cache = attention_sublayer(config, layout, w, x, rope, attend, cache, layer, biased)
    return ffn_sublayer(config, layout, w, x), cache


def hf_keys(config: Config) -> dict[str, HfKey]:
    prefix = "model.layers.{layer}.self_attn."
    biases = {f"layers.{name}_bias": HfKey(f"{prefix}{name}_proj.bias", "heads_bias") for name in ("q", "k", "v")}
    return {**llama.hf_keys(config), **biases}
