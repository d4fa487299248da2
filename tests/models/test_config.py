"""Truth 8, of models: every constant is read and comes from the config; what is not computed is refused."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from rljax.models import FAMILIES
from rljax.models.decoder import Model
from rljax.models.hf_config import ModelFolderError
from rljax.models.layers import RopeScaling
from rljax.models.params import declare, init_params, map_params
from tests.models.tiny import TINY, layout, random_tokens, row_logits, tiny_model, with_fields

CHANGES = {
    "vocab_size": 79,
    "width": 40,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 4,
    "ffn_width": 56,
    "norm_eps": 1e-2,
    "rope_theta": 500.0,
    "rope_scaling": RopeScaling(kind="linear", factor=3.0),
    "max_positions": 128,
    "tied_embeddings": True,
    "init_std": 0.3,
    "sliding_window": 3,
    "vocab_multiple": 256,
}
# Where a change does not show in the logits of given weights.
SILENT = {"max_positions", "init_std", "vocab_multiple"}


def _logits_and_export(model: Model) -> tuple[np.ndarray, dict[str, Any]]:
    seeds = itertools.count()  # one for each leaf, so that rows of padding do not shift the next leaf's draws
    params = map_params(
        lambda p: np.random.default_rng(next(seeds)).normal(size=p.shape).astype(np.float32), declare(model)
    )
    tokens = random_tokens(79, 1, 8)
    return row_logits(model, layout(), params, tokens, np.ones(tokens.shape, bool)), model.family.to_hf(model.config)


def test_every_field_of_a_config_is_read() -> None:
    """A changed field changes what is computed, and what is exported if it is a constant of the model."""
    model = tiny_model("mistral")
    for family in FAMILIES.values():
        fields = {field.name for field in dataclasses.fields(family.Config)}
        assert fields == set(CHANGES), "a new field needs a line in CHANGES"
    logits, exported = _logits_and_export(model)
    for name, value in CHANGES.items():
        assert value != vars(model.config)[name]
        changed, written = _logits_and_export(with_fields(model, **{name: value}))
        assert np.array_equal(changed, logits) == (name in SILENT), name
        assert (written == exported) == (name == "vocab_multiple"), name
    assert declare(with_fields(model, vocab_multiple=256))["embed"].shape == (256, 32)
    wide = init_params(with_fields(model, init_std=0.3), layout(), seed=0)["embed"]
    np.testing.assert_allclose(wide, 1.5 * init_params(model, layout(), seed=0)["embed"], rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_survives_the_way_out_and_back(family: str) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    for changes in ({}, {"rope_scaling": scaling}, {"rope_scaling": {"type": "linear", "factor": 2.0}}):
        model = tiny_model(family, **changes)
        again = model.family.to_hf(model.config)
        assert again["model_type"] == family
        assert model.family.from_hf(again) == model.config


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias = True is not supported for llama"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs the key 'low_freq_factor'"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rms_norm_eps": None}, "the key 'rms_norm_eps' is missing"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantised"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"head_dim": None}, "'head_dim' is missing"),
    ],
)
def test_what_a_family_does_not_compute_is_refused(family: str, changes: dict, message: str) -> None:
    with pytest.raises(ModelFolderError, match=message):
        tiny_model(family, **changes)


def test_mistral_must_say_its_window() -> None:
    unsaid = {key: value for key, value in TINY.items() if key != "sliding_window"}
    with pytest.raises(ModelFolderError, match="null means no window"):
        FAMILIES["mistral"].from_hf({"model_type": "mistral", **unsaid})


@pytest.mark.parametrize("family", FAMILIES)
def test_only_llama2_does_not_say_its_theta(family: str) -> None:
    unsaid = {"model_type": family} | {key: value for key, value in TINY.items() if key != "rope_theta"}
    for config in (unsaid, {**unsaid, "rope_parameters": {"rope_type": "default"}}):
        if family == "llama":
            assert FAMILIES[family].from_hf(config).rope_theta == 10_000
        else:
            with pytest.raises(ModelFolderError, match=f"config.json of a {family}: the key 'rope_theta' is missing"):
                FAMILIES[family].from_hf(config)
