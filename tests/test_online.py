"""Every online algorithm in the real loop, on eight devices: two steps of two updates, ratios, frozen models."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.collect import collect
from rljax.config import algo_defaults, make_config
from rljax.data.batches import DataPosition
from rljax.metric_names import undocumented
from rljax.session import open_session
from rljax.stage_models import frozen_sources
from rljax.stage_state import abstract_saved, restored, saved
from rljax.stage_steps import online_step, score
from rljax.stages import Stage
from rljax.steps import TrainState
from tests.tiny import tiny_config
from tests.truths import digit_share, main_stage

POLICY: dict[str, Any] = {"kl_coef": 0.05, "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean"}
CRITIC: dict[str, Any] = {"value_coef": 0.1, "value_clip": 0.2, "gamma": 1.0}
PPO = {**POLICY, **CRITIC, "lam": 0.95, "whiten_advantages": "minibatch"}
DREAMER = {
    "value_loss": "two_hot",
    "value_ema_coef": 1.0,
    "whiten_advantages": "none",
    "scale_by_percentile": True,
}
GRPO = {**POLICY, "advantage_mean": "group", "advantage_std": "batch"}
SEQUENCES = {**GRPO, "aggregation": "sequence_mean_token_mean"}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"name": "ppo", **PPO, "missing_end": "subtract", "missing_end_value": 1.0, "kl_target": 1.0},
    "dreamer": {"name": "ppo", **PPO, **DREAMER, "value_bins": 32, "truncated": "bootstrap"},
    "ppo_max": {"name": "ppo_max", **PPO, "normalized_clip": 10.0},
    "rto": {"name": "rto", **PPO, "guide_coef": 0.05, "guide_clamp": 0.05},
    "vtrace": {"name": "vtrace", **POLICY, **CRITIC, "rho_clip": 1.0, "c_clip": 1.0},
    "rloo": {"name": "rloo", **POLICY},
    "remax": {"name": "reinforce", **POLICY, "gamma": 1.0, "baseline": "greedy", "whiten_advantages": False},
    "gspo": {"name": "grpo", **SEQUENCES, "surrogate": "gspo", "correction": "truncated"},
    "kl_cov": {"name": "grpo", **GRPO, "covariance": "kl_cov", "covariance_share": 0.1},
    "online_dpo": {"name": "online_dpo", "beta": 0.1},
    "xpo": {"name": "xpo", "beta": 0.1, "alpha": 0.01},
    "nash_md": {"name": "nash_md", "beta": 0.1, "mixture": 0.25},
    "distillation": {"name": "distillation", "beta": 0.5},
}
WITHOUT_RATIO = ("distillation", "online_dpo", "xpo", "nash_md")
BESIDE: dict[str, dict[str, Any]] = {
    "dreamer": {"rollout.unimix": 0.05},
    "rto": {"guide_from": "warm_start"},
    "distillation": {"teacher_from": "warm_start", "teacher_top_k": 4},
}


def open_stage(name: str, **overrides: Any) -> Stage:
    config = tiny_config(
        **{
            "mesh": "1,8,1",
            "recipe": ("warm_start", "main"),
            "rollout.prompts_per_step": 16,
            **BESIDE.get(name, {}),
            **overrides,
        }
    )
    config.unlock()
    config.algo = algo_defaults(ALGORITHMS[name]["name"])
    config.algo.update(ALGORITHMS[name])
    session = open_session(make_config(config), jax.devices())
    stage = main_stage(session, digit_share)
    # Samplers are the same programs for all, but for those of two writers, greedy samples and an even share.
    if not stage.algorithm.greedy_samples and not stage.rival and not stage.config.rollout.unimix:
        stage.generate = sampler()
    others = session.base_params()
    others = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), others)
    for model in frozen_sources(stage.config, stage.algorithm):
        if model != "reference":
            stage.freeze(model, others)
    return stage


@cache
def sampler() -> Any:
    session = open_session(make_config(tiny_config(mesh="1,8,1", **{"rollout.prompts_per_step": 16})), jax.devices())
    return main_stage(session, digit_share).generate


def start(stage: Stage) -> TrainState:
    trees = {"policy": stage.session.base_params()}
    if "critic" in stage.trees:
        trees["critic"] = stage.session.with_scalar_head(trees["policy"], stage.trees["critic"], 0)
    return stage.start(trees)


def run(stage: Stage, state: TrainState, steps: int) -> tuple[TrainState, list[dict[str, float]]]:
    position, metrics = DataPosition(), []
    for step in range(steps):
        state, position, values, _ = online_step(stage, state, position, step)
        metrics.append(values)
    return state, metrics


def moved(before: Any, after: Any) -> bool:
    return any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


# Each compiles programs of its own; the critic's phase below has PPO's.
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("online_dpo", "nash_md", "gspo") else pytest.param(name, marks=pytest.mark.slow)
        for name in ALGORITHMS
    ],
)
def test_two_steps(name: str) -> None:
    """Every tree moves, no frozen model does; ratios are 1 in the first update of a rollout and not in the second."""
    stage = open_stage(name)
    state = start(stage)
    before, frozen = jax.device_get(state.params), jax.device_get(stage.frozen)
    state, metrics = run(stage, state, 2)
    assert int(state.step) == 4
    assert all(moved(before[tree], state.params[tree]) for tree in stage.algorithm.trains)
    jax.tree.map(np.testing.assert_array_equal, stage.frozen, frozen)
    for values in metrics:
        assert undocumented(name for name in values if name != "tokens") == []
        assert np.isfinite(list(values.values())).all()
        assert values["train/skipped"] == 0
        if name not in WITHOUT_RATIO:
            assert values["train/first_max_log_ratio"] <= 1e-5
            assert values["train/max_log_ratio"] > 1e-4
    if "critic" in stage.trees:
        assert metrics[0]["train/explained_variance"] < 1


def test_a_critic_only_phase_leaves_the_policy_as_it_is() -> None:
    stage = open_stage("ppo", **{"optim.freeze_steps": 2})
    state = start(stage)
    before = jax.device_get(state.params)
    state, metrics = run(stage, state, 1)
    jax.tree.map(np.testing.assert_array_equal, state.params["policy"], before["policy"])
    assert moved(before["critic"], state.params["critic"])
    assert metrics[0]["train/learning_rate"] == 0 < metrics[0]["train/learning_rate/critic"]
    state, metrics = run(stage, state, 1)
    assert moved(before["policy"], state.params["policy"])
    assert metrics[0]["train/first_max_log_ratio"] <= 1e-5 and metrics[0]["train/max_log_ratio"] > 1e-4


def test_a_critic_s_running_mean_reads_each_rollout_and_follows() -> None:
    """Two updates a rollout, decay .98: .9604 of the mean stays. At first it is the critic, so its loss is that of
    zero logits; later it stands between the first critic and the last."""
    stage = open_stage("dreamer")
    state = start(stage)
    first = jax.device_get(state.params["critic"])
    jax.tree.map(np.testing.assert_array_equal, stage.critic_mean, first)
    state, metrics = run(stage, state, 1)
    expected = jax.tree.map(lambda m, p: 0.9604 * m + 0.0396 * np.asarray(p), first, state.params["critic"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), stage.critic_mean, expected)
    kept = saved(stage, state)
    assert jax.tree.structure(abstract_saved(stage)) == jax.tree.structure(kept)
    jax.tree.map(np.testing.assert_array_equal, kept["critic_mean"], stage.critic_mean)
    assert metrics[0]["train/value_ema"] == pytest.approx(np.log(32), rel=0.01)
    assert metrics[0]["train/first_max_log_ratio"] <= 1e-5  # the even share is in both log-probs
    stage.critic_mean = None
    restored(stage, kept)
    assert stage.critic_mean is kept["critic_mean"]


def test_a_rival_writes_the_second_half_of_a_prompt_s_completions() -> None:
    """With a reference whose weights are 0 the second halves come from an even distribution over 18 tokens."""
    stage = open_stage("xpo")
    state = start(stage)
    position = DataPosition()
    plain = open_stage("rloo")
    alone = collect(plain, state, position, 0)[0].host
    biased = jax.tree.map(jnp.zeros_like, stage.reference)
    stage.frozen["reference"] = biased  # an even distribution
    done, _, metrics = collect(stage, state, position, 0)
    both = done.host
    np.testing.assert_array_equal(both.sample_id, [0, 1] * 16)
    of_each = [metrics["train/reward"], metrics["train/reward_rival"]]
    np.testing.assert_allclose(of_each, [done.rewards[0::2].mean(), done.rewards[1::2].mean()])
    assert metrics["train/groups_kept"] == 1
    np.testing.assert_array_equal(both.tokens[0::2], alone.tokens[0::2])
    spread = both.behavior_logprobs[1::2][both.loss_mask[1::2]]
    np.testing.assert_allclose(spread, -np.log(18), rtol=1e-5)
    # The KL is the policy's: half of all rows, the reference's own, would pull it towards 0.
    head_from = both.tokens.shape[1] - stage.config.rollout.max_new_tokens
    experience, found = score(stage, state, done, head_from, 0)
    gaps = np.where(both.loss_mask, both.behavior_logprobs - np.asarray(experience.ref_logprobs), 0).sum(axis=1)
    assert np.abs(gaps[1::2]).max() < 1e-4 < abs(gaps[0::2].mean())
    np.testing.assert_allclose(found["train/kl_per_completion"], gaps[0::2].mean(), rtol=1e-4)


def test_a_lag_is_what_the_log_says_and_the_old_policy_stays_readable() -> None:
    """Two updates a rollout: from the second rollout on the sampler is two optimizer steps behind."""
    stage = open_stage("gspo", **{"rollout.lag": 1})
    state, metrics = run(stage, start(stage), 2)
    kept = jax.device_get(state.params["policy"])
    state, last = run(stage, state, 1)
    assert [values["rollout/staleness"] for values in metrics + last] == [0, 2, 2]
    assert metrics[0]["train/first_max_log_ratio"] <= 1e-5
    assert metrics[1]["train/first_max_log_ratio"] > 1e-3
    # The update gave the buffers of this policy away; the next rollout is its all the same.
    assert (int(stage.past[0].step), int(state.step)) == (4, 6)
    jax.tree.map(np.testing.assert_array_equal, stage.past[0].policy, kept)
    assert jax.tree.structure(abstract_saved(stage)) == jax.tree.structure(saved(stage, state))
