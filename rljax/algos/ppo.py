"""PPO (1707.06347) with a critic, as in RLHF: the score on the last token, the KL in the reward, GAE.

Tulu 2.5 (2406.09279), Tulu 3 (2411.15124) and the TL;DR reproduction (2403.17031) are settings of this file. RTO and
PPO-max stand in files of their own. DreamerV3's tricks (2310.17805): value_loss two_hot, value_ema_coef,
scale_by_percentile, and ``rollout.unimix``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.algos.base import Algorithm, Batch
from rljax.algos.critic import CriticLossConfig, as_value, critic_batch, value_terms, with_critic
from rljax.algos.policy import (
    ShapedRewardConfig,
    aggregation_of,
    kl_in_reward,
    policy_batch,
    policy_needs,
    policy_prepare,
    policy_terms,
)
from rljax.algos.scores import clip_to, is_finished, scores_of
from rljax.losses.advantages import (
    PercentileScale,
    empty_percentile_scale,
    scale_by_percentile,
    update_percentile_scale,
)
from rljax.losses.guidance import shifted_rewards
from rljax.losses.kl import adaptive_kl_coef
from rljax.losses.masked import count_sequences, masked_sum, whiten, zero_masked
from rljax.losses.returns import gae, on_last_token
from rljax.types import Experience, Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config(ShapedRewardConfig, CriticLossConfig):
    gamma: float  # discount per token
    lam: float  # GAE's λ
    whiten_advantages: Literal["rollout", "minibatch", "none"]  # whiten over the tokens of which batch
    whiten_rewards: bool = False  # normalise token rewards over the rollout, keeping the mean (2403.17031, detail 24)
    kl_target: float | None = None  # target of an adaptive kl_coef, nats per completion (1909.08593)
    kl_horizon: float = 10000.0  # completions over which the adaptive coefficient can about double
    truncated: Literal["terminal", "bootstrap"] = (
        "terminal"  # value after a completion that was cut off: 0, or the critic's last value
    )
    advantage_clip: float | None = None  # clip advantages to ± this, after whitening
    scale_by_percentile: bool = False  # divide advantages by a running percentile range of returns; excludes whitening
    dense_coef: float = 0.0  # weight of token-level rewards (ARES: 1; LMGT: its shift)
    dense_rollouts: int = 0  # anneal dense_coef to 0 over this many rollouts; 0: constant


class State(NamedTuple):
    rollouts: Int[Array, ""]
    kl_coef: Float[Array, ""]
    returns: PercentileScale


def make(
    config: Config,
    *,
    group_size: int,
    max_new_tokens: int,
    token_rewards: Callable[[Experience], Float[Array, "b t"]] | None = None,
) -> Algorithm:
    """``token_rewards`` are added to those of PPO, whitened with them. Raises ValueError for contradicting settings."""
    if config.kl_target and not (config.kl_coef and config.kl_in == "reward"):
        raise ValueError("kl_target steers the KL in the reward; set kl_coef, its start, and kl_in to 'reward'")
    if config.scale_by_percentile and config.whiten_advantages != "none":
        raise ValueError("whitening undoes scale_by_percentile; set whiten_advantages to 'none'")
    needs, aggregation = policy_needs(config), aggregation_of(config, max_new_tokens)
    needs |= {"dense_rewards"} if config.dense_coef else set()

    def init() -> State:
        return State(jnp.int32(0), jnp.asarray(config.kl_coef, float), empty_percentile_scale())

    def targets(state: State, experience: Experience) -> tuple[State, Batch]:
        mask = experience.rollout.loss_mask
        assert experience.values is not None and experience.final_values is not None  # it is in needs
        values, final = as_value(config, experience.values), as_value(config, experience.final_values)
        kl = kl_in_reward(config, experience)
        rewards = on_last_token(scores_of(config, experience), mask) - state.kl_coef * kl
        rewards = _shifted(config, state, experience, rewards)
        if token_rewards is not None:
            rewards += token_rewards(experience)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        after = jnp.where(is_finished(experience), 0, final) if config.truncated == "bootstrap" else None
        advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam, bootstrap_values=after)
        coef = state.kl_coef
        state = _updated(config, state, masked_sum(kl, mask) / jnp.maximum(count_sequences(mask), 1), returns, mask)
        if config.scale_by_percentile:
            advantages = scale_by_percentile(advantages, state.returns)
        raw = advantages
        if config.whiten_advantages == "rollout":
            advantages = clip_to(whiten(advantages, mask), config.advantage_clip)
        batch = policy_batch(config, experience, advantages) | critic_batch(config, experience, values, returns)
        batch |= {"raw_advantages": raw, "kl_coef": jnp.broadcast_to(coef, mask.shape[:1])}
        if config.mask_truncated and config.whiten_advantages == "minibatch":
            batch["sampled_mask"] = mask
        return state, jax.lax.stop_gradient(batch)

    def prepare(state: State, batch: Batch, key: Array) -> tuple[State, Batch, dict]:
        if config.whiten_advantages == "minibatch":
            sampled = batch.get("sampled_mask", batch["loss_mask"])  # statistics come before rows are masked
            batch = {**batch, "advantages": whiten(batch["advantages"], sampled)}
        if config.whiten_advantages != "rollout":
            batch = {**batch, "advantages": clip_to(batch["advantages"], config.advantage_clip)}
        return state, *policy_prepare(config, aggregation, batch, key)

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        mask = batch["loss_mask"]
        coef = Term(masked_sum(jnp.broadcast_to(batch["kl_coef"][:, None], mask.shape), mask), "tokens", 0.0)
        terms = policy_terms(config, aggregation, outputs, batch) | value_terms(config, outputs, batch)
        return {**terms, "kl_coef": coef}

    return with_critic(config, Algorithm(frozenset(needs), init, targets, prepare, loss))


def _shifted(config: Config, state: State, experience: Experience, rewards: Array) -> Array:
    """Token rewards with those of ``dense_rewards``, whose weight fades over rollouts."""
    if not config.dense_coef:
        return rewards
    assert experience.dense_rewards is not None  # it is in needs
    dense = zero_masked(experience.rollout.loss_mask, experience.dense_rewards)
    progress = state.rollouts / config.dense_rollouts if config.dense_rollouts else 0.0
    return shifted_rewards(rewards, dense, coef=config.dense_coef, progress=progress)


def _updated(config: Config, state: State, kl: Array, returns: Array, mask: Array) -> State:
    """After a rollout whose completions have a mean KL of ``kl`` nats."""
    coef, scale = state.kl_coef, state.returns
    if config.kl_target:
        samples = mask.shape[0]
        coef = adaptive_kl_coef(coef, kl, target_kl=config.kl_target, horizon=config.kl_horizon, n_samples=samples)
    if config.scale_by_percentile:
        scale = update_percentile_scale(scale, returns, mask)
    return State(state.rollouts + 1, coef, scale)
