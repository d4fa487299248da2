"""Llama 2, 3, 3.1, 3.2 and models of their shape (SmolLM2, TinyLlama): 2302.13971, 2407.21783."""

from typing import Any

from jaxtyping import Array

from rljax.models.attention import Attend
from rljax.models.decoder import (
    DecoderConfig,
    HfKey,
    Params,
    attention_sublayer,
    declare_attention,
    declare_ffn,
    ffn_sublayer,
)
from rljax.models.hf_config import decoder_fields, hf_fields, refuse
from rljax.models.layers import Param, Rope
from rljax.sharding import Layout

Config = DecoderConfig


def from_hf(config: dict) -> Config:
    refuse(config, attention_bias=True, mlp_bias=True)
    # Llama 2's config.json is older than rope_theta: what it leaves unsaid is 10,000.
    return Config(**decoder_fields(config, unsaid_theta=10_000.0), sliding_window=None)


def to_hf(config: Config) -> dict:
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **hf_fields(config)}


def declare_layer(config: Config) -> dict[str, Param]:
    return {**declare_attention(config), **declare_ffn(config)}


def block(
    config: Config, layout: Layout, w: Params, x: Array, rope: Rope, attend: Attend, cache: Any, layer: Array
) -> tuple[Array, Any]:
    x, cache = attention_sublayer(config, layout, w, x, rope, attend, cache, layer)
    return ffn_sublayer(config, layout, w, x), cache


def hf_keys(config: Config) -> dict[str, HfKey]:
    prefix = "model.layers.{layer}."
    return {
        "embed": HfKey("model.embed_tokens.weight", "same"),
        "final_norm": HfKey("model.norm.weight", "same"),
        "lm_head": HfKey("lm_head.weight", "same"),
        "layers.attention_norm": HfKey(prefix + "input_layernorm.weight", "same"),
        "layers.q": HfKey(prefix + "self_attn.q_proj.weight", "heads_out"),
        "layers.k": HfKey(prefix + "self_attn.k_proj.weight", "heads_out"),
        "layers.v": HfKey(prefix + "self_attn.v_proj.weight", "heads_out"),
        "layers.o": HfKey(prefix + "self_attn.o_proj.weight", "heads_in"),
        "layers.ffn_norm": HfKey(prefix + "post_attention_layernorm.weight", "same"),
        "layers.gate": HfKey(prefix + "mlp.gate_proj.weight", "transposed"),
        "layers.up": HfKey(prefix + "mlp.up_proj.weight", "transposed"),
        "layers.down": HfKey(prefix + "mlp.down_proj.weight", "transposed"),
    }
