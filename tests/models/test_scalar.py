"""Reward models as Hugging Face folders: transformers' sequence classification says the same, and back."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rljax.forward import make_reward
from rljax.models.hf import ModelFolderError, load_config, load_params, save_hf
from rljax.models.params import init_params
from tests.models.tiny import layout, tiny_model
from tests.truths import tiny_forward

IDS = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows of 5, 9 and 3 tokens, none of them the pad token."""
    tokens = np.random.default_rng(0).integers(3, 80, (3, 9))
    valid = np.arange(9) < np.array([[5], [9], [3]])
    return np.where(valid, tokens, 0).astype(np.int32), valid


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_transformers_gives_the_same_scores(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=family == "qwen3")._replace(scores=1).padded_for(1)
    params = init_params(model, layout(), seed=0)
    save_hf(tmp_path / "out", model, params, generation_config=IDS)
    tokens, valid = rows()
    ours = make_reward(tiny_forward(model, layout()), 1)(params, {"tokens": tokens, "valid": valid})
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__.endswith("ForSequenceClassification") and theirs.config.num_labels == 1
    with torch.no_grad():
        scores = theirs(torch.tensor(tokens), attention_mask=torch.tensor(valid)).logits[:, 0].numpy()
    np.testing.assert_allclose(ours, scores, atol=2e-5)

    again = load_params(tmp_path / "out", load_config(tmp_path / "out").padded_for(1)._replace(scores=1), layout())
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    """A reward model of another library: sharded as it likes, without a bias."""
    model = tiny_model("llama", tie_word_embeddings=False)._replace(scores=1)
    save_hf(tmp_path / "ours", model, init_params(model, layout(), seed=1), generation_config=IDS)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_params(tmp_path / "theirs", load_config(tmp_path / "theirs")._replace(scores=1), layout())
    np.testing.assert_array_equal(loaded["score"], theirs.score.weight.detach().numpy())
    np.testing.assert_array_equal(loaded["score_bias"], [0.0])


def test_a_bias_is_kept(tmp_path: Path) -> None:
    """Transformers' class has none, so its scores are lower by it."""
    model = tiny_model("llama")._replace(scores=1)
    params = {**init_params(model, layout(), seed=0), "score_bias": jnp.array([0.75])}
    save_hf(tmp_path / "out", model, params, generation_config=IDS)
    np.testing.assert_array_equal(load_params(tmp_path / "out", model, layout())["score_bias"], [0.75])


def test_a_language_model_is_refused_as_a_reward_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_hf(tmp_path / "lm", model, init_params(model, layout(), seed=0))
    with pytest.raises(ModelFolderError, match=r"lm is no reward model: the tensor score\.weight, its scalar head"):
        load_params(tmp_path / "lm", model._replace(scores=1), layout())


def test_config_json_says_what_it_is(tmp_path: Path) -> None:
    model = tiny_model("qwen2")._replace(scores=1)
    save_hf(tmp_path / "out", model, init_params(model, layout(), seed=0), generation_config=IDS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert (config["id2label"], config["pad_token_id"], config["eos_token_id"]) == ({"0": "LABEL_0"}, 0, 2)
    assert not (tmp_path / "out" / "generation_config.json").exists()
