"""Every online algorithm learns what its reward asks for: the task of truth 10, some from older samples."""

from typing import Any

import jax
import pytest

from rljax.config import algo_defaults, make_config
from rljax.data.batches import DataPosition
from rljax.session import open_session
from rljax.stage_steps import online_step
from tests.test_truth_learning import SETTINGS, STEPS, begins_with_7
from tests.tiny import tiny_config
from tests.truths import main_stage

POLICY: dict[str, Any] = {"kl_coef": 0.0, "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean"}
CRITIC: dict[str, Any] = {"value_coef": 1.0, "value_clip": 0.2, "gamma": 1.0}
PPO = {**POLICY, **CRITIC, "lam": 0.95, "whiten_advantages": "rollout"}
GRPO = {**POLICY, "advantage_mean": "group", "advantage_std": "group"}
SEQUENCES = {**GRPO, "aggregation": "sequence_mean_token_mean"}
REINFORCE = {**POLICY, "gamma": 1.0}
VTRACE = {**POLICY, **CRITIC, "rho_clip": 1.0, "c_clip": 1.0}
FAST_CRITIC = {"critic.optim.learning_rate": 1e-2}
PAIRS = {"rollout.prompts_per_step": 32, "rollout.group_size": 2}
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ppo, 4 epochs": ("ppo", PPO, {**FAST_CRITIC, "batch.epochs": 4}),
    "two-hot critic": ("ppo", {**PPO, "value_loss": "two_hot", "value_bins": 32}, FAST_CRITIC),
    "ppo-max": ("ppo_max", {**PPO, "whiten_advantages": "none", "normalized_clip": 10.0}, FAST_CRITIC),
    "v-trace, one behind": ("vtrace", VTRACE, {**FAST_CRITIC, "rollout.lag": 1}),
    "rloo": ("rloo", POLICY, {}),
    "reinforce++": ("reinforce", {**REINFORCE, "baseline": "none", "whiten_advantages": True}, {}),
    "remax": ("reinforce", {**REINFORCE, "baseline": "greedy", "whiten_advantages": False}, {}),
    "gspo": ("grpo", {**SEQUENCES, "surrogate": "gspo", "clip_low": 0.03, "clip_high": 0.04}, {"batch.epochs": 2}),
    "cispo": ("grpo", {**GRPO, "surrogate": "cispo"}, {"batch.epochs": 2}),
    "gmpo": ("grpo", {**SEQUENCES, "surrogate": "gmpo", "clip_low": 0.4, "clip_high": 0.4}, {"batch.epochs": 2}),
    "sapo": ("grpo", {**SEQUENCES, "surrogate": "sapo"}, {"batch.epochs": 2}),
    "gpg": ("grpo", {**GRPO, "advantage_std": "none", "surrogate": "reinforce", "advantage_scale": "mixed_groups"}, {}),
    "opo": ("grpo", {**GRPO, "advantage_std": "none", "advantage_mean": "by_length"}, {}),
    "kl-cov": ("grpo", {**GRPO, "covariance": "kl_cov", "covariance_share": 0.05}, {}),
    "tis, one behind": ("grpo", {**GRPO, "correction": "truncated"}, {"rollout.lag": 1}),
    "online dpo, one behind": ("online_dpo", {"beta": 0.1}, {"rollout.lag": 1}),
    "xpo": ("xpo", {"beta": 0.1, "alpha": 1e-3}, PAIRS),
    "nash-md": ("nash_md", {"beta": 0.02, "mixture": 0.125, "preference": "order"}, PAIRS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_learns(name: str) -> None:
    algo, settings, overrides = METHODS[name]
    shared = {key: value for key, value in SETTINGS.items() if not key.startswith("algo.")}
    config = tiny_config(**{"recipe": ("main",), **shared, **overrides})
    config.unlock()
    config.algo = algo_defaults(algo)
    config.algo.update(settings)
    stage = main_stage(open_session(make_config(config), jax.devices()[:1]), begins_with_7)
    trees = {"policy": stage.session.base_params()}
    if "critic" in stage.trees:
        trees["critic"] = stage.session.with_scalar_head(trees["policy"], stage.trees["critic"], 0)
    state, position, curve = stage.start(trees), DataPosition(), []
    for step in range(STEPS):
        state, position, _, done = online_step(stage, state, position, step)
        assert done is not None
        own = done.host.sample_id < stage.config.rollout.group_size // (2 if stage.rival else 1)
        curve.append(float(done.rewards[own].mean()))  # not what a rival wrote
    assert sum(curve[:2]) / 2 < 0.2
    assert sum(curve[-5:]) / 5 > 0.9
