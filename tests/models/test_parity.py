"""Truth 9: the same logits as transformers, on the way in and on the way out, and as float64 goldens."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rljax.models.hf import ModelFolderError, load_config, load_params, save_hf
from rljax.models.layers import rope_frequencies
from rljax.models.params import parameter_count
from tests.models.tiny import REAL_CONFIGS, cut_down, layout, left_padded, random_tokens, real_config, row_logits

CHECKPOINTS = ("stories260K-hf", "tinystories656K-hf", "babyllama361-hf")
VARIANTS = (*REAL_CONFIGS, "mistral without a window", "llama tied the other way")


class Reference(NamedTuple):
    folder: Path
    config: dict[str, Any]
    model: Any

    def logits(self, tokens: np.ndarray, valid: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        counted = np.maximum(np.cumsum(valid, axis=1) - 1, 0) if positions is None else positions
        ids, mask, counted = (torch.from_numpy(x.astype(np.int64)) for x in (tokens, valid, counted))
        with torch.no_grad():
            return self.model(input_ids=ids, attention_mask=mask, position_ids=counted).logits.numpy()


def variant_config(data_dir: Path, variant: str) -> dict[str, Any]:
    family = variant.split()[0]
    config = cut_down(real_config(data_dir, REAL_CONFIGS[family]))
    if variant == "mistral without a window":
        return {**config, "sliding_window": None}
    if variant == "llama tied the other way":
        return {**config, "tie_word_embeddings": not config["tie_word_embeddings"]}
    return config


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough that attention is far from uniform and that norms and biases matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * (0.5 if weight.ndim == 1 else 1.4 / weight.shape[1] ** 0.5))


@pytest.fixture(scope="module", params=VARIANTS)
def reference(request: pytest.FixtureRequest, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    config = variant_config(data_dir, request.param)
    source = tmp_path_factory.mktemp("config")
    (source / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(source)).eval()
    randomise(model)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return Reference(folder, config, model)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_real_checkpoints_against_float64_goldens(data_dir: Path, name: str) -> None:
    golden = np.load(data_dir / "golden" / f"{name}.npz")
    model = load_config(data_dir / "models" / name)
    params = load_params(data_dir / "models" / name, model, layout())
    rows = [golden[f"ids{i}"] for i in range(3)]
    longest = max(map(len, rows))
    tokens = np.stack([np.pad(row, (longest - len(row), 0)) for row in rows])
    out = row_logits(model, layout(), params, tokens, left_padded([len(row) for row in rows], longest))
    for i, row in enumerate(rows):
        mine = out[i, longest - len(row) :]
        np.testing.assert_allclose(mine, golden[f"logits{i}"], rtol=0, atol=1e-4)
        logprobs = np.take_along_axis(np.asarray(jax.nn.log_softmax(jnp.asarray(mine)))[:-1], row[1:, None], axis=1)
        np.testing.assert_allclose(logprobs[:, 0], golden[f"logprobs{i}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS[:2])
def test_real_checkpoints_equal_transformers(data_dir: Path, name: str) -> None:
    """In float32, on rows of different lengths; the goldens have none."""
    folder = data_dir / "models" / name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_config(folder)
    params = load_params(folder, model, layout())
    tokens, valid = random_tokens(model.config.vocab_size, 3, 24), left_padded([24, 9, 2], 24)
    expected = Reference(folder, {}, theirs).logits(tokens, valid)
    assert np.abs(expected[valid]).max() > 2, "too flat to compare"
    mine = row_logits(model, layout(), params, tokens, valid)
    np.testing.assert_allclose(mine[valid], expected[valid], rtol=0, atol=1e-4)


def test_family_equals_transformers(reference: Reference) -> None:
    model = load_config(reference.folder)
    params = load_params(reference.folder, model, layout())
    tokens = random_tokens(model.config.vocab_size, 3, 24)
    for valid in (np.ones(tokens.shape, bool), left_padded([24, 9, 2], 24)):
        expected = reference.logits(tokens, valid)
        assert np.abs(expected[valid]).max() > 2, "too flat to compare"
        mine = row_logits(model, layout(), params, tokens, valid)
        np.testing.assert_allclose(mine[valid], expected[valid], rtol=0, atol=1e-4)


def test_far_positions_equal_transformers(reference: Reference) -> None:
    """Gaps of hundreds between tokens: where theta and Llama 3's rope scaling decide."""
    model = load_config(reference.folder)
    if model.config.sliding_window is not None:
        return  # transformers measures a window in columns, this library in positions: they agree on rows without gaps
    params = load_params(reference.folder, model, layout())
    tokens = random_tokens(model.config.vocab_size, 3, 24)
    positions = np.arange(24)[None] * np.array([[1], [31], [499]])
    valid = np.ones(tokens.shape, bool)
    expected = reference.logits(tokens, valid, positions)
    mine = row_logits(model, layout(), params, tokens, valid, positions)
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-4)
    if model.config.rope_scaling is not None:
        unscaled = model._replace(config=dataclasses.replace(model.config, rope_scaling=None))
        wrong = row_logits(unscaled, layout(), params, tokens, valid, positions)
        assert np.abs(wrong - expected).max() > 0.05


def test_old_and_new_rope_layout_read_alike(reference: Reference, tmp_path: Path) -> None:
    new = json.loads((reference.folder / "config.json").read_text())
    assert "rope_parameters" in new and "rope_theta" not in new
    assert "rope_theta" in reference.config and "rope_parameters" not in reference.config
    (tmp_path / "config.json").write_text(json.dumps(reference.config))
    assert load_config(tmp_path).config.rope_theta == reference.config["rope_theta"]
    assert load_config(tmp_path) == load_config(reference.folder)


def test_export_loads_in_transformers_with_the_same_logits(reference: Reference, tmp_path: Path) -> None:
    model = load_config(reference.folder)
    save_hf(tmp_path / "out", model, load_params(reference.folder, model, layout()))
    assert load_config(tmp_path / "out") == model
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.dtype == torch.float32
    tokens = random_tokens(model.config.vocab_size, 3, 24)
    valid = left_padded([24, 9, 2], 24)
    exported = reference._replace(model=again).logits(tokens, valid)
    np.testing.assert_allclose(exported[valid], reference.logits(tokens, valid)[valid], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["meta-llama--Llama-3.2-1B", "meta-llama--Meta-Llama-3.1-405B"])
def test_rope_scaling_llama3(data_dir: Path, name: str) -> None:
    """At full head width, every frequency that transformers computes."""
    config = transformers.AutoConfig.from_pretrained(data_dir / "configs" / name)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    mine = load_config(data_dir / "configs" / name).config
    scaled = rope_frequencies(mine.head_dim, mine.rope_theta, mine.rope_scaling)
    np.testing.assert_allclose(scaled, rotary.inv_freq.numpy(), rtol=1e-6)
    assert np.ptp(scaled / rope_frequencies(mine.head_dim, mine.rope_theta, None)) > 0.8  # 1 at one end, 1/factor


SUPPORTED = (
    "HuggingFaceTB--SmolLM2-135M",
    "Qwen--Qwen2-0.5B",
    "Qwen--Qwen2.5-0.5B-Instruct",
    "Qwen--Qwen2.5-7B-Instruct",
    "Qwen--Qwen3-0.6B",
    "Qwen--Qwen3-1.7B",
    "Qwen--Qwen3-8B",
    "TinyLlama--TinyLlama-1.1B-Chat-v1.0",
    "meta-llama--Llama-3.2-1B",
    "meta-llama--Meta-Llama-3.1-405B",
    "meta-llama--Meta-Llama-3.1-70B",
    "meta-llama--Meta-Llama-3.1-8B",
    "mistralai--Mistral-7B-v0.1",
)


@pytest.mark.parametrize("name", SUPPORTED)
def test_parameter_counts(data_dir: Path, name: str) -> None:
    folder = data_dir / "configs" / name
    with torch.device("meta"):
        expected = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert parameter_count(load_config(folder)) == sum(weight.numel() for weight in expected.parameters())


def test_every_other_real_config_is_refused_by_name(data_dir: Path) -> None:
    others = {folder.name for folder in (data_dir / "configs").iterdir()} - set(SUPPORTED)
    assert {"google--gemma-2b", "mistralai--Mixtral-8x7B-v0.1", "Qwen--Qwen3-30B-A3B"} <= others
    for name in others:
        kind = real_config(data_dir, name)["model_type"]
        with pytest.raises(ModelFolderError, match=f"no family for model_type '{kind}'; there are llama, mistral"):
            load_config(data_dir / "configs" / name)
