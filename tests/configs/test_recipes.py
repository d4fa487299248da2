"""Recipes by value: what a paper reports is what the config says; and shrunk, each one builds, shards and trains."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rljax.config import ConfigError, make_config, parse
from rljax.config.build import as_dict
from rljax.metric_names import undocumented
from rljax.models import FAMILIES
from rljax.run import finish, open_training
from rljax.session import open_session
from rljax.shrink import shrink
from rljax.trainer import train
from tests.conftest import ROOT
from tests.tiny import lines

FILES = (
    "ares",
    "async_online_dpo",
    "if_rlvr",
    "mpo",
    "olmo2",
    "ppo_dreamer",
    "ppo_max",
    "rto",
    "teaching_reasoning",
    "tldr",
    "tricks_or_traps",
    "tulu2p5",
    "tulu3",
    "zephyr",
)


def recipes() -> dict[str, Callable[[], ConfigDict]]:
    found = {}
    for file in FILES:
        module = vars(importlib.import_module(f"configs.{file}"))
        variants = module.get("VARIANTS", {"": module["get_config"]})
        found |= {f"{file}:{name}".rstrip(":"): make for name, make in variants.items()}
    return found


RECIPES = recipes()

# (key, value, where it is published); a stage's keys stand behind its name. "code" is the authors'.
VALUES: dict[str, list[tuple[str, Any, str]]] = {
    "tulu2p5:dpo": [
        ("algo.beta", 0.1, "2406.09279, code"),
        ("algo.loss", "sigmoid", "2406.09279, code"),
        ("optim.learning_rate", 5e-7, "2406.09279, code"),
        ("optim.schedule", "linear", "2406.09279, code"),
        ("optim.warmup_fraction", 0.1, "2406.09279, code"),
        ("optim.weight_decay", 0.0, "2406.09279, code"),
        ("batch.rows", 8 * 4, "2406.09279, code"),
        ("data.row_length", 4096, "2406.09279, code"),
        ("steps", 3 * 60_908 // 32, "2406.09279: 3 epochs of 60,908 pairs"),
    ],
    "tulu2p5:ppo": [
        ("reward_model.algo.loss", "bradley_terry", "2406.09279, code"),
        ("reward_model.optim.learning_rate", 1e-5, "2406.09279, code"),
        ("reward_model.optim.final_learning_rate", 1e-6, "2406.09279, code"),
        ("reward_model.optim.warmup_fraction", 0.03, "2406.09279, code"),
        ("reward_model.batch.rows", 32 * 16, "2406.09279, code"),
        ("reward_model.steps", 60_908 // 512, "2406.09279: 1 epoch"),
        ("algo.missing_end", "replace", "2406.09279, code"),
        ("algo.missing_end_value", -10.0, "2406.09279, code"),
        ("algo.kl_coef", 0.05, "2406.09279, code; .0325 for larger reward models"),
        ("algo.kl_in", "reward", "2406.09279, code: k1 in the reward"),
        ("algo.kl_estimator", "k1", "2406.09279, code"),
        ("algo.gamma", 1.0, "2406.09279, code"),
        ("algo.lam", 0.95, "2406.09279, code"),
        ("algo.clip_low", 0.2, "2406.09279, code"),
        ("algo.clip_high", 0.2, "2406.09279, code"),
        ("algo.value_clip", 0.2, "2406.09279, code"),
        ("algo.value_coef", 0.1, "2406.09279, code: pg + .1 vf"),
        ("algo.whiten_advantages", "minibatch", "2406.09279, code"),
        ("algo.aggregation", "token_mean", "2406.09279, code"),
        ("critic.init_from", "reward_model", "2406.09279, code: head included"),
        ("optim.learning_rate", 1e-6, "2406.09279, code"),
        ("critic.optim.learning_rate", 1e-6, "2406.09279, code"),
        ("optim.warmup_fraction", 0.1, "2406.09279, code: then constant"),
        ("optim.schedule", "constant", "2406.09279, code"),
        ("optim.b1", 0.9, "2406.09279, code"),
        ("optim.b2", 0.95, "2406.09279, code"),
        ("optim.clip_norm", 1.0, "2406.09279, code"),
        ("rollout.prompts_per_step", 512, "2406.09279, code"),
        ("rollout.group_size", 1, "2406.09279, code"),
        ("batch.minibatches", 512 // 64, "2406.09279, code: mini-batches of 64"),
        ("batch.epochs", 1, "2406.09279, code"),
        ("rollout.temperature", 0.7, "2406.09279, code"),
        ("rollout.max_new_tokens", 1024, "2406.09279, code"),
        ("data.prompt_lengths", (1024,), "2406.09279, code"),
    ],
    "tulu3:sft": [
        ("optim.learning_rate", 5e-6, "2411.15124, 8B"),
        ("optim.schedule", "linear", "2411.15124"),
        ("optim.warmup_fraction", 0.03, "2411.15124"),
        ("batch.rows", 128, "2411.15124"),
        ("data.row_length", 4096, "2411.15124"),
        ("steps", 2 * 939_343 // 128, "2411.15124: 2 epochs; rows of the mixture's card"),
    ],
    "tulu3:dpo": [
        ("algo.average", True, "2411.15124: length-normalised"),
        ("algo.beta", 5.0, "2411.15124"),
        ("optim.learning_rate", 5e-7, "2411.15124, 8B"),
        ("batch.rows", 128, "2411.15124"),
        ("data.row_length", 2048, "2411.15124"),
        ("steps", 271_409 // 128, "2411.15124: 1 epoch; rows of the mixture's card"),
    ],
    "tulu3:ppo": [
        ("reward_model.optim.learning_rate", 3e-6, "2411.15124"),
        ("reward_model.batch.epochs", 1, "2411.15124"),
        ("reward.weights", (10.0,), "2411.15124: 10 if verified, else 0"),
        ("algo.missing_end_value", -10.0, "2411.15124"),
        ("algo.gamma", 1.0, "2411.15124"),
        ("algo.lam", 0.95, "2411.15124"),
        ("algo.clip_low", 0.2, "2411.15124"),
        ("algo.clip_high", 0.2, "2411.15124"),
        ("algo.value_clip", 0.2, "2411.15124"),
        ("algo.value_coef", 0.1, "2411.15124"),
        ("algo.kl_coef", 0.05, "2411.15124, 8B"),
        ("algo.whiten_advantages", "rollout", "2411.15124"),
        ("batch.epochs", 4, "2411.15124"),
        ("batch.minibatches", 1, "2411.15124"),
        ("optim.learning_rate", 3e-7, "2411.15124, 8B"),
        ("optim.schedule", "linear", "2411.15124"),
        ("rollout.prompts_per_step", 224, "2411.15124, 8B"),
        ("rollout.max_new_tokens", 2048, "2411.15124"),
        ("rollout.temperature", 1.0, "2411.15124"),
        ("critic.init_from", "reward_model", "2411.15124"),
        ("reward_model_from", "", "2411.15124: adding its scores hurts"),
        ("steps", (7_473 + 7_500 + 14_973) // 224, "2411.15124: GSM8K, MATH and IF prompts"),
    ],
    "tulu3:grpo": [
        ("rollout.prompts_per_step", 48, "open-instruct, Tülu 3.1"),
        ("rollout.group_size", 16, "open-instruct, Tülu 3.1"),
        ("optim.learning_rate", 5e-7, "open-instruct, Tülu 3.1"),
        ("optim.schedule", "constant", "open-instruct, Tülu 3.1"),
        ("algo.kl_coef", 0.01, "open-instruct, Tülu 3.1"),
        ("algo.kl_estimator", "k3", "open-instruct, Tülu 3.1"),
        ("algo.kl_in", "loss", "open-instruct, Tülu 3.1"),
    ],
    "tulu3:sft_70b": [("optim.learning_rate", 2e-6, "2411.15124, 70B")],
    "tulu3:dpo_70b": [("optim.learning_rate", 2e-7, "2411.15124, 70B")],
    "tulu3:ppo_70b": [
        ("optim.learning_rate", 1e-7, "2411.15124, 70B"),
        ("rollout.prompts_per_step", 640, "2411.15124, 70B"),
        ("algo.kl_coef", 0.07, "2411.15124, 70B"),
    ],
    "olmo2:grpo": [
        ("optim.learning_rate", 5e-7, "2501.00656, docs of open-instruct"),
        ("algo.kl_coef", 0.01, "2501.00656, docs of open-instruct"),
        ("rollout.prompts_per_step", 48, "2501.00656, docs of open-instruct"),
        ("rollout.group_size", 16, "2501.00656, docs of open-instruct"),
    ],
    "zephyr:paper": [
        ("algo.beta", 0.1, "2310.16944"),
        ("optim.learning_rate", 5e-7, "2310.16944"),
        ("steps", 3 * 61_135 // 128, "2310.16944: about 3 epochs; rows of the data set's card"),
    ],
    "zephyr:handbook": [
        ("sft.optim.learning_rate", 2e-5, "alignment handbook"),
        ("sft.optim.schedule", "cosine", "alignment handbook"),
        ("sft.optim.warmup_fraction", 0.1, "alignment handbook"),
        ("sft.data.row_length", 2048, "alignment handbook"),
        ("sft.batch.rows", 128, "alignment handbook"),
        ("algo.beta", 0.01, "alignment handbook"),
        ("optim.learning_rate", 5e-7, "alignment handbook"),
        ("optim.schedule", "cosine", "alignment handbook"),
        ("optim.warmup_fraction", 0.1, "alignment handbook"),
        ("data.row_length", 1024, "alignment handbook"),
        ("data.prompt_lengths", (512,), "alignment handbook"),
        ("batch.rows", 128, "alignment handbook"),
        ("steps", 61_135 // 128, "alignment handbook: 1 epoch"),
    ],
    "ppo_dreamer:tricks": [
        ("algo.value_loss", "two_hot", "2310.17805"),
        ("algo.value_bins", 256, "2310.17805, code: from -20 to 20"),
        ("algo.value_ema_coef", 1.0, "2310.17805, code"),
        ("algo.value_ema_decay", 0.98, "2310.17805, code; 2301.04104"),
        ("algo.scale_by_percentile", True, "2310.17805"),
        ("algo.whiten_advantages", "none", "2310.17805: it would undo the scaling"),
        ("rollout.unimix", 0.01, "2310.17805: 99 % of the actor, 1 % uniform"),
        ("critic.init_from", "policy", "2310.17805: a new head, of zeros"),
        ("algo.gamma", 0.99, "2310.17805, code"),
        ("algo.lam", 0.95, "2310.17805, code"),
        ("algo.clip_low", 0.1, "2310.17805, code"),
        ("algo.clip_high", 0.1, "2310.17805, code"),
        ("algo.value_coef", 0.5, "2310.17805, code"),
        ("algo.entropy_coef", 0.01, "2310.17805, code"),
        ("algo.kl_coef", 0.0, "2310.17805: none"),
        ("batch.epochs", 4, "2310.17805, code"),
        ("batch.minibatches", 4, "2310.17805, code"),
        ("optim.learning_rate", 2.5e-4, "2310.17805, code"),
        ("critic.optim.learning_rate", 2.5e-4, "2310.17805, code"),
        ("optim.schedule", "linear", "2310.17805, code: to 0"),
        ("optim.eps", 1e-5, "2310.17805, code"),
        ("optim.clip_norm", 0.5, "2310.17805, code: of policy and critic together"),
        ("clip_scope", "joint", "2310.17805, code"),
    ],
    "ppo_dreamer:plain": [
        ("algo.value_loss", "clipped", "2310.17805, code"),
        ("algo.value_clip", 0.1, "2310.17805, code"),
        ("algo.whiten_advantages", "minibatch", "2310.17805, code"),
        ("algo.value_ema_coef", 0.0, "2310.17805, code"),
        ("rollout.unimix", 0.0, "2310.17805, code"),
    ],
    "ppo_max:paper": [
        ("algo.reward_center", True, "2307.04964: running mean and deviation"),
        ("algo.normalized_clip", 10.0, "2307.04964, code: reward clip"),
        ("algo.kl_coef", 0.05, "2307.04964: η"),
        ("algo.value_clip", 0.2, "2307.04964"),
        ("algo.clip_low", 0.2, "2307.04964, code"),
        ("algo.clip_high", 0.2, "2307.04964, code"),
        ("algo.gamma", 1.0, "2307.04964"),
        ("algo.lam", 0.95, "2307.04964"),
        ("critic.init_from", "reward_model", "2307.04964"),
        ("optim.learning_rate", 5e-7, "2307.04964, code"),
        ("critic.optim.learning_rate", 1.5e-6, "2307.04964, code"),
        ("optim.b1", 0.9, "2307.04964, code"),
        ("optim.b2", 0.95, "2307.04964, code"),
        ("critic.optim.b2", 0.95, "2307.04964, code"),
        ("optim.clip_norm", 1.0, "2307.04964: global gradient clipping"),
        ("text_mix.coef", 1.0, "2307.04964: PPO-ptx"),
        ("optim.schedule", "inverse_sqrt", "2307.04964, code"),
        ("optim.warmup_steps", 500, "2307.04964, code"),
        ("rollout.prompts_per_step", 128, "2307.04964, code"),
        ("batch.minibatches", 128 // 32, "2307.04964, code: batches of 32"),
    ],
    "ppo_max:script": [
        ("algo.reward_center", False, "2307.04964, English script"),
        ("algo.kl_coef", 0.01, "2307.04964, English script"),
        ("text_mix.coef", 0.0, "2307.04964, English script"),
        ("algo.advantage_clip", 0.5, "2307.04964, code"),
        ("rollout.temperature", 0.8, "2307.04964, code"),
        ("rollout.top_p", 0.9, "2307.04964, code"),
    ],
    "rto": [
        ("algo.guide_coef", 0.05, "2404.18922, code"),
        ("algo.guide_clamp", 0.05, "2404.18922, code"),
        ("algo.kl_coef", 0.01, "2404.18922, code"),
        ("algo.reward_clip", 10.0, "2404.18922, code"),
        ("algo.gamma", 1.0, "2404.18922"),
        ("optim.learning_rate", 5e-7, "2404.18922, code"),
        ("critic.optim.learning_rate", 9e-6, "2404.18922, code"),
        ("critic.init_from", "reward_model", "2404.18922, code"),
        ("rollout.prompts_per_step", 1024, "2404.18922, code"),
        ("batch.minibatches", 1024 // 128, "2404.18922, code: batches of 128"),
        ("rollout.max_new_tokens", 1024, "2404.18922, code"),
        ("data.prompt_lengths", (1024,), "2404.18922, code"),
        ("guide_from", "dpo", "2404.18922"),
        ("reference_from", "start", "2404.18922: the SFT model"),
    ],
    "tricks_or_traps:lite_ppo": [
        ("algo.advantage_mean", "group", "2508.08221"),
        ("algo.advantage_std", "batch", "2508.08221"),
        ("algo.aggregation", "token_mean", "2508.08221"),
        ("algo.clip_low", 0.2, "2508.08221"),
        ("algo.clip_high", 0.2, "2508.08221"),
        ("algo.kl_coef", 0.0, "2508.08221"),
        ("rollout.prompts_per_step", 128, "2508.08221"),
        ("rollout.group_size", 8, "2508.08221"),
        ("optim.learning_rate", 1e-6, "2508.08221"),
        ("optim.weight_decay", 0.0, "2508.08221"),
        ("optim.warmup_steps", 50, "2508.08221"),
        ("steps", 500, "2508.08221"),
        ("batch.epochs", 1, "2508.08221"),
        ("rollout.temperature", 0.99, "2508.08221"),
        ("rollout.top_p", 0.99, "2508.08221"),
        ("rollout.top_k", 100, "2508.08221"),
        ("data.prompt_lengths", (1024,), "2508.08221"),
        ("rollout.max_new_tokens", 8192, "2508.08221, text"),
        ("seed", 42, "2508.08221"),
    ],
    "tricks_or_traps:grpo": [
        ("algo.advantage_std", "group", "2508.08221"),
        ("algo.aggregation", "sequence_mean_token_mean", "2508.08221"),
    ],
    "tricks_or_traps:aligned": [
        ("algo.clip_high", 0.28, "2508.08221: 8B, aligned"),
        ("algo.aggregation", "sequence_mean_token_mean", "2508.08221: aligned models"),
    ],
    "tricks_or_traps:dapo": [
        ("algo.clip_low", 0.2, "2503.14476"),
        ("algo.clip_high", 0.28, "2503.14476"),
        ("algo.kl_coef", 0.0, "2503.14476"),
        ("algo.aggregation", "token_mean", "2503.14476"),
        ("rollout.keep_groups", "mixed", "2503.14476: dynamic sampling"),
        ("rollout.max_rounds", 1536 // 512, "verl's recipe"),
    ],
    "if_rlvr:plain": [
        ("optim.learning_rate", 5e-7, "2507.02833"),
        ("optim.schedule", "constant", "2507.02833"),
        ("rollout.temperature", 1.0, "2507.02833"),
        ("rollout.prompts_per_step", 48, "2507.02833"),
        ("rollout.group_size", 16, "2507.02833"),
        ("rollout.max_new_tokens", 2048, "2507.02833"),
        ("algo.kl_coef", 0.01, "2507.02833: k3"),
        ("batch.minibatches", 2, "2507.02833"),
        ("steps", 2000, "2507.02833"),
        ("reward.options.ifeval.value", "sum", "2507.02833: Σ v w"),
        ("reward.weights", (1.0,), "2507.02833"),
    ],
    "if_rlvr:code": [
        ("reward.options.ifeval.value", "mean", "2507.02833, code"),
        ("reward.weights", (10.0,), "2507.02833, code"),
    ],
    "if_rlvr:base_model": [
        ("rollout.max_new_tokens", 10_240, "2507.02833"),
        ("algo.kl_coef", 0.0, "2507.02833"),
    ],
    "if_rlvr:reward_model": [("reward_model_threshold", 7.0, "2507.02833: α")],
    "async_online_dpo:online": [
        ("algo.beta", 0.1, "2410.18252"),
        ("algo.missing_end_value", -1.0, "2410.18252"),
        ("rollout.group_size", 2, "2410.18252: K"),
        ("rollout.prompts_per_step", 512 // 2, "2410.18252: batch 512"),
        ("rollout.max_new_tokens", 53, "2410.18252"),
        ("rollout.temperature", 0.7, "2410.18252"),
        ("rollout.lag", 1, "2410.18252: samples of the version before"),
        ("optim.learning_rate", 3e-6, "2410.18252"),
        ("steps", 131_072 // 512, "2410.18252: 256 steps"),
    ],
    "async_online_dpo:stale": [
        ("batch.minibatches", 64, "2410.18252: N"),
        ("rollout.lag", 0, "2410.18252: N alone makes samples old"),
    ],
    "teaching_reasoning:expert_iteration": [
        ("sample_1.rollout.group_size", 96, "2403.04642: K"),
        ("learn_2.init_from", "base", "2403.04642: the initial checkpoint"),
        ("learn_4.data.train", "rollouts:sample_1,sample_2,sample_3,sample_4", "2403.04642: union of rounds"),
        ("learn_1.select.rule", "correct", "2403.04642"),
        ("learn_1.select.distinct", "equations", "2403.04642: de-duplicated"),
        ("eval.samples", 96, "2403.04642: maj@96, pass@96"),
    ],
    "teaching_reasoning:ppo": [("algo.kl_coef", 0.05, "2403.04642")],
    "tldr": [
        ("sft.steps", 116_722 // 128, "2403.17031, detail 9"),
        ("sft.optim.learning_rate", 3e-6, "2403.17031, detail 9"),
        ("sft.optim.eps", 1e-5, "2403.17031, detail 9"),
        ("sft.optim.schedule", "cosine", "2403.17031, detail 9"),
        ("sft.batch.rows", 128, "2403.17031, detail 9"),
        ("sft.data.row_length", 562, "2403.17031, detail 5"),
        ("reward_model.steps", 92_858 // 64, "2403.17031, detail 10"),
        ("reward_model.batch.rows", 64, "2403.17031, detail 10"),
        ("reward_model.data.row_length", 638, "2403.17031, detail 5"),
        ("data.prompt_lengths", (512,), "2403.17031, detail 5"),
        ("steps", 1_000_000 // 512, "2403.17031, detail 20"),
        ("rollout.prompts_per_step", 512, "2403.17031, detail 20"),
        ("batch.epochs", 4, "2403.17031, detail 20"),
        ("batch.minibatches", 1, "2403.17031, detail 20"),
        ("optim.learning_rate", 3e-6, "2403.17031, detail 20"),
        ("optim.schedule", "linear", "2403.17031, detail 20"),
        ("algo.kl_coef", 0.05, "2403.17031, detail 20"),
        ("algo.gamma", 1.0, "2403.17031, detail 20"),
        ("algo.lam", 0.95, "2403.17031, detail 20"),
        ("algo.clip_low", 0.2, "2403.17031, detail 20"),
        ("algo.clip_high", 0.2, "2403.17031, detail 20"),
        ("algo.value_clip", 0.2, "2403.17031, detail 20"),
        ("algo.value_coef", 0.1, "2403.17031, detail 20"),
        ("rollout.temperature", 0.7, "2403.17031, detail 20"),
        ("eval.temperature", 0.01, "2403.17031, detail 20"),
        ("rollout.max_new_tokens", 53, "2403.17031, details 4 and 23"),
        ("algo.missing_end_value", -1.0, "2403.17031, detail 23"),
    ],
    "ares": [
        ("algo.dense_coef", 1.0, "2407.00087, code"),
        ("algo.kl_coef", 1e-4, "2407.00087, code"),
        ("algo.value_loss", "squared", "2407.00087, code: unclipped"),
        ("algo.gamma", 1.0, "2407.00087, code"),
        ("algo.lam", 0.95, "2407.00087, code"),
        ("algo.clip_low", 0.2, "2407.00087, code"),
        ("optim.learning_rate", 2e-5, "2407.00087, code"),
        ("rollout.group_size", 4, "2407.00087, code"),
        ("reward.discard_failed", True, "2407.00087, code: other numbers of sentences and scores"),
    ],
    "mpo": [
        ("easy.select.gap", "easy", "2403.19443"),
        ("select.gap", "difficult", "2403.19443"),
        ("init_from", "easy", "2403.19443: the DPO model"),
        ("reference_from", "start", "2403.19443: the DPO model"),
    ],
}


def value_at(name: str, key: str) -> Any:
    config = make_config(RECIPES[name]())
    first, _, rest = key.partition(".")
    place: Any = config.stage(first) if first in config.stages else config
    values = as_dict(place)
    for part in (rest if first in config.stages else key).split("."):
        values = values[part]
    return values


@pytest.mark.fast
@pytest.mark.parametrize("name", VALUES)
def test_what_is_published_is_what_the_config_says(name: str) -> None:
    wrong = {
        key: (value_at(name, key), value, source) for key, value, source in VALUES[name] if value_at(name, key) != value
    }
    assert not wrong


@pytest.mark.fast
def test_every_recipe_has_a_published_value_or_says_why_not() -> None:
    """The other loops of expert iteration share its values, and OLMo 2 at 7B those of Tülu 3."""
    shared = {f"teaching_reasoning:{name}" for name in ("rejection", "raft", "returns")}
    assert set(RECIPES) - set(VALUES) == {*shared, "olmo2:ppo"}


@pytest.mark.fast
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_named_on_the_command_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file, _, variant = name.partition(":")
    path = f"configs/{file}.py" + (f":{variant}" if variant else "")
    assert parse(["--config", path]).config == make_config(RECIPES[name]())
    assert path.removesuffix(":" + variant) in (ROOT / "docs" / "methods.md").read_text()


@pytest.mark.fast
def test_a_variant_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match="has no variant 'papr'; it has handbook, paper"):
        parse(["--config", "configs/zephyr.py:papr"])
    with pytest.raises(ConfigError, match="it has none: leave it out"):
        parse(["--config", "configs/quickstart.py:x"])


@pytest.mark.fast
def test_olmo_2_waits_for_its_family() -> None:
    """When the family is here this fails: then its recipe's docstring says so no longer, and neither does this."""
    assert "olmo2" not in FAMILIES
    assert "Waits for its family" in (ROOT / "configs" / "olmo2.py").read_text()
    for recipe in ("tldr", "async_online_dpo"):
        assert ("gpt_neox" in FAMILIES) != ("gpt_neox" in (ROOT / "configs" / f"{recipe}.py").read_text())


# Of these a shrunk run differs; a method's own settings are not among them.
SIZES = {
    *("recipe", "mesh", "decode_mesh", "compute_dtype", "steps", "guide_from", "teacher_from", "reward_model_from"),
    *(
        "model.path",
        "model.remat",
        "model.architecture",
        "tokenizer.path",
        "tokenizer.template",
        "tokenizer.system_prompt",
    ),
    *(
        "algo.overlong_buffer",
        "reward.names",
        "reward.weights",
        "reward.options",
        "checkpoint.every_steps",
        "select.labels",
    ),
    *("critic.init_from", "critic.center_on", "optim.warmup_steps", "optim.freeze_steps"),
    *("critic.optim.warmup_steps", "critic.optim.freeze_steps"),
    *("rollout.prompts_per_step", "rollout.group_size", "rollout.max_new_tokens"),
    *("batch.rows", "batch.minibatches", "batch.micro_batch_rows"),
    *("data.train", "data.dev", "data.test", "data.train_rows", "data.dev_rows", "data.test_rows"),
    *("data.splits_by_prompt", "data.prompt_lengths", "data.row_length", "data.prompt_prefix"),
    *("text_mix.train", "text_mix.train_rows", "text_mix.rows", "text_mix.row_length"),
}
# Groups whose keys are those of a model, of a data set or of a task.
OPEN = {"reward.options", "model.architecture", "data.columns", "data.options", "text_mix.columns", "text_mix.options"}


@pytest.mark.fast
@pytest.mark.parametrize("name", RECIPES)
def test_shrinking_changes_sizes_only(name: str) -> None:
    small, changed = shrink(RECIPES[name]())
    before = make_config(RECIPES[name]())
    for key in changed:
        parts = key.removeprefix("config.").split(".")
        parts = parts[2:] if parts[0] == "stages" else parts
        if key.startswith("config.stages.reward_model") and "reward_model" not in before.recipe:
            continue  # a reward model that lay in a folder is trained first
        assert ".".join(parts) in SIZES or ".".join(parts[:2]) in OPEN, key
    after = make_config(small)
    assert [s for s in after.recipe if s in before.recipe] == list(before.recipe)
    for stage in before.recipe:
        settings = [as_dict(config.stage(stage).algo) for config in (before, after)]
        was, now = ({**algo, "overlong_buffer": 0} for algo in settings)
        assert was == now
        assert after.stage(stage).optim.learning_rate == before.stage(stage).optim.learning_rate
        assert after.stage(stage).batch.epochs == before.stage(stage).batch.epochs


@pytest.mark.fast
def test_all_recipes_shrink_to_one_model_and_one_shape_of_rows() -> None:
    models, shapes = set(), set()
    for make in RECIPES.values():
        session = open_session(make_config(shrink(make())[0]), jax.devices()[:2])
        models.add(
            (session.model, session.tokenizer.vocab_size, session.dtype, session.train.mesh, session.decode.mesh)
        )
        for name in session.config.recipe:
            stage = session.config.stage(name)
            rows = (stage.rows_per_step, stage.longest_row) if stage.is_online else (stage.rows_per_step,)
            shapes.add((*rows, stage.data.row_length, stage.data.prompt_lengths, stage.rollout.max_new_tokens))
    assert len(models) == 1
    assert shapes == {(8, 16, 32, (8,), 8), (8, 32, (8,), 8)}


# One of each algorithm and kind of stage; all the others with the slow tests.
QUICK = ("tulu3:dpo", "tricks_or_traps:lite_ppo", "teaching_reasoning:rejection")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES])
def test_a_recipe_trains_when_shrunk(name: str, tmp_path: Path) -> None:
    """Two steps of every stage on two devices, all of one shape: programs are shared through the cache."""
    small, _ = shrink(RECIPES[name]())
    small.output_dir = str(tmp_path / "run")
    session = open_session(make_config(small), jax.devices()[:2])
    with open_training(session) as opened:
        train(opened)
        finish(opened)
    records = [record for record in lines(tmp_path / "run") if "train/skipped" in record]
    assert [record["phase"] for record in records] == [stage for stage in session.config.recipe for _ in range(2)]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses and np.isfinite(losses).all() and not any(record["train/skipped"] for record in records)
    assert session.train.data_shards == 2
    for record in lines(tmp_path / "run"):
        assert undocumented(record.keys() - {"step", "phase"}) == []
