"""Small models for tests: made by hand, or cut down from the config.json of real ones."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rljax.models import FAMILIES
from rljax.models.decoder import Model, Params, hidden_states, logits
from rljax.sharding import TRAIN_RULES, Layout, make_mesh, parse_mesh

REAL_CONFIGS = {
    "llama": "meta-llama--Llama-3.2-1B",
    "mistral": "mistralai--Mistral-7B-v0.1",
    "qwen2": "Qwen--Qwen2.5-0.5B-Instruct",
    "qwen3": "Qwen--Qwen3-0.6B",
}

TINY = {
    "vocab_size": 83,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # large, so that attention is far from uniform
    "sliding_window": None,
}


def tiny_model(family: str = "llama", **changes: Any) -> Model:
    return Model(FAMILIES[family], FAMILIES[family].from_hf({"model_type": family, **TINY, **changes}))


def with_fields(model: Model, **changes: Any) -> Model:
    return model._replace(config=dataclasses.replace(model.config, **changes))


def layout(text: str = "1,1,1") -> Layout:
    """A mesh of as many of the simulated devices as the string multiplies to."""
    count = int(np.prod([int(size) for size in text.split(",")]))
    assert parse_mesh(text, count)
    return Layout(make_mesh(text, jax.devices()[:count]), TRAIN_RULES)


def random_tokens(vocab: int, rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (rows, length), dtype=np.int32)


def left_padded(lengths: list[int], length: int) -> np.ndarray:
    return np.arange(length)[None] >= length - np.asarray(lengths)[:, None]


@partial(jax.jit, static_argnums=(0, 1))
def _logits(model: Model, place: Layout, params: Params, tokens: Any, segments: Any, positions: Any) -> Any:
    return logits(model, params, hidden_states(model, place, params, tokens, segments, positions))


def row_logits(
    model: Model, place: Layout, params: Params, tokens: np.ndarray, valid: np.ndarray, positions: Any = None
) -> np.ndarray:
    """Logits of whole rows without the padding of the vocabulary; positions count real tokens unless given."""
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0) if positions is None else positions
    out = _logits(model, place, params, tokens, valid.astype(np.int32), positions.astype(np.int32))
    return np.asarray(out)[..., : model.config.vocab_size]


def real_config(data_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((data_dir / "configs" / name / "config.json").read_text())


def cut_down(real: dict[str, Any], layers: int = 2, kv_heads: int = 2, head_dim: int = 8) -> dict[str, Any]:
    """A real config at toy depth and width: its ratios, rope, eps and flags stay."""
    heads = kv_heads * real["num_attention_heads"] // real["num_key_value_heads"]
    real_head_dim = real.get("head_dim", real["hidden_size"] // real["num_attention_heads"])
    width = heads * head_dim * real["hidden_size"] // (real["num_attention_heads"] * real_head_dim)
    changes = {
        "vocab_size": 211,
        "hidden_size": width,
        "intermediate_size": width * real["intermediate_size"] // real["hidden_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if real.get("max_window_layers"):
        changes["max_window_layers"] = layers
    if real.get("sliding_window") and "use_sliding_window" not in real:
        changes["sliding_window"] = 7  # shorter than the tests' rows
    return {**real, **changes, "pad_token_id": None}
