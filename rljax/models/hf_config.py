"""Hugging Face's config.json, old and new layout, to the fields every family shares."""

from typing import Any

from rljax.models.layers import RopeScaling


class ModelFolderError(ValueError):
    """A model folder that cannot be used as it stands."""


def refuse(config: dict, **unsupported: Any) -> None:
    """Raise where the checkpoint asks for what a family here does not compute."""
    for key, value in unsupported.items():
        if config.get(key) == value:
            raise ModelFolderError(f"config.json: {key} = {value!r} is not supported for {config['model_type']}")


def _field(config: dict, key: str) -> Any:
    if config.get(key) is None:
        raise ModelFolderError(f"config.json of a {config.get('model_type', 'model')}: the key {key!r} is missing")
    return config[key]


def _rope(config: dict) -> tuple[float, RopeScaling | None]:
    """Old: rope_theta beside rope_scaling. transformers 5: both inside rope_parameters."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta")
    if theta is None:
        raise ModelFolderError("config.json: no rope_theta, neither at the top nor in rope_parameters")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), RopeScaling(kind=kind, factor=float(_field(rope, "factor")))
    if kind == "llama3":
        return float(theta), RopeScaling(
            kind=kind,
            factor=float(_field(rope, "factor")),
            low_freq_factor=float(_field(rope, "low_freq_factor")),
            high_freq_factor=float(_field(rope, "high_freq_factor")),
            original_max_positions=int(_field(rope, "original_max_position_embeddings")),
        )
    raise ModelFolderError(f"config.json: rope type {kind!r} is not supported; default, linear and llama3 are")


def decoder_fields(config: dict) -> dict[str, Any]:
    """The fields of DecoderConfig but ``sliding_window``, each read from the checkpoint; a missing one is an error."""
    if config.get("hidden_act", "silu") != "silu":
        raise ModelFolderError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; silu is")
    theta, scaling = _rope(config)
    heads = _field(config, "num_attention_heads")
    return {
        "vocab_size": _field(config, "vocab_size"),
        "width": _field(config, "hidden_size"),
        "num_layers": _field(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or _field(config, "hidden_size") // heads,
        "ffn_width": _field(config, "intermediate_size"),
        "norm_eps": _field(config, "rms_norm_eps"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_positions": _field(config, "max_position_embeddings"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "init_std": float(_field(config, "initializer_range")),
    }
