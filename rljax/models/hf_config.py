"""config.json to the fields that all families share, and back. Reads the old and the transformers-5 layout."""

from typing import Any

from rljax.models.decoder import DecoderConfig
from rljax.models.layers import RopeScaling


class ModelFolderError(ValueError):
    """A model folder that cannot be used as it stands."""


def refuse(config: dict, **unsupported: Any) -> None:
    """Raise where the checkpoint asks for what a family here does not compute."""
    for key, value in unsupported.items():
        if config.get(key) == value:
            raise ModelFolderError(f"config.json: {key} = {value!r} is not supported for {config['model_type']}")


def required(config: dict, key: str) -> Any:
    """A key that must be there and not null."""
    if config.get(key) is None:
        raise ModelFolderError(f"config.json of a {config.get('model_type', 'model')}: the key {key!r} is missing")
    return config[key]


def refuse_sliding_layers(config: dict) -> None:
    """Qwen may let its upper layers slide and its lower ones not; the skeleton here has one window for all layers."""
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ModelFolderError(
            "config.json: sliding-window layers (use_sliding_window, layer_types) are not supported for "
            f"{config['model_type']}; set use_sliding_window to false to attend to everything"
        )


def decoder_fields(config: dict, *, unsaid_theta: float | None = None) -> dict[str, Any]:
    """The fields of DecoderConfig but ``sliding_window``, each read from the checkpoint; a missing one is an error.

    ``unsaid_theta`` is what a family means that has published configs without ``rope_theta``.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise ModelFolderError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; silu is")
    if config.get("quantization_config"):
        raise ModelFolderError("config.json: quantised weights (quantization_config) are not supported")
    theta, scaling = _rope(config, unsaid_theta)
    heads, width = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    kv_heads = _count(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads
    head_dim = _count(config, "head_dim") if config.get("head_dim") else width // heads
    if heads % kv_heads or head_dim % 2:
        raise ModelFolderError(
            f"config.json: {heads} query heads over {kv_heads} kv heads of width {head_dim}; the second number has to "
            "divide the first, and the width is even"
        )
    return {
        "vocab_size": _count(config, "vocab_size"),
        "width": width,
        "num_layers": _count(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_width": _count(config, "intermediate_size"),
        "norm_eps": _number("rms_norm_eps", required(config, "rms_norm_eps")),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_positions": _count(config, "max_position_embeddings"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "init_std": _number("initializer_range", required(config, "initializer_range")),
    }


def _count(config: dict, key: str) -> int:
    value = required(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelFolderError(f"config.json: {key} is {value!r}; it is a whole number above 0")
    return value


def _number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelFolderError(f"config.json: {key} is {value!r}; it is a number")
    return float(value)


def hf_fields(c: DecoderConfig) -> dict[str, Any]:
    """The inverse of ``decoder_fields``. The old rope layout, which every version of transformers reads."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_width,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling and _hf_scaling(c.rope_scaling),
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tied_embeddings,
        "initializer_range": c.init_std,
    }


def _rope(config: dict, unsaid_theta: float | None) -> tuple[float, RopeScaling | None]:
    """Old: rope_theta beside rope_scaling. transformers 5: both inside rope_parameters."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    said = rope.pop("rope_theta", config.get("rope_theta", unsaid_theta))
    theta = _number("rope_theta", required({**config, "rope_theta": said}, "rope_theta"))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1.0):
        raise ModelFolderError("config.json: a partial_rotary_factor other than 1 is not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=float(_rope_field(rope, "factor")))
    if kind == "llama3":
        return theta, RopeScaling(
            kind=kind,
            factor=float(_rope_field(rope, "factor")),
            low_freq_factor=float(_rope_field(rope, "low_freq_factor")),
            high_freq_factor=float(_rope_field(rope, "high_freq_factor")),
            original_max_positions=int(_rope_field(rope, "original_max_position_embeddings")),
        )
    raise ModelFolderError(f"config.json: rope type {kind!r} is not supported; default, linear and llama3 are")


def _rope_field(rope: dict, key: str) -> Any:
    if rope.get(key) is None:
        raise ModelFolderError(f"config.json: the rope scaling needs the key {key!r}")
    return rope[key]


def _hf_scaling(scaling: RopeScaling) -> dict[str, Any]:
    fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return fields
    return {
        **fields,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
