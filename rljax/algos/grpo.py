"""GRPO (2402.03300) and its variants: completions are compared with the others of the same prompt.

Dr. GRPO (2503.20783): advantage_std none, constant_length. DAPO (2503.14476): clip_high .28, token_mean, kl_coef 0, an
overlong buffer, ``rollout.keep_groups`` mixed. Lite PPO (2508.08221): advantage_std batch, token_mean. GSPO, CISPO,
GMPO, SAPO: their surrogate. GPG (2504.02546): surrogate reinforce, advantage_scale. OPO (2505.23585): advantage_mean
by_length. Clip-Cov and KL-Cov: covariance.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.algos.base import Algorithm, Batch
from rljax.algos.policy import PolicyConfig, kl_in_reward, policy_algorithm, policy_batch
from rljax.algos.scores import is_finished
from rljax.losses.advantages import (
    RunningMoments,
    empty_moments,
    group_ids,
    merge_moments,
    mixed_groups,
    moments_of,
    normalize_rewards,
    opo_baseline,
    soft_overlong_penalty,
)
from rljax.losses.masked import masked_sum
from rljax.types import Experience

Statistic = Literal["group", "batch", "running", "none"]


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    advantage_mean: Literal["group", "batch", "running", "none", "by_length"]  # what is subtracted from a reward
    advantage_std: Statistic  # what it is divided by; batch uses the raw rewards
    advantage_scale: Literal["none", "mixed_groups", "nonzero_rewards"] = (
        "none"  # GPG's α: rows over rows of groups with differing rewards; over rows with a reward that is not 0 (verl)
    )
    truncated_in_statistics: bool = True  # truncated completions count in the statistics of rewards
    overlong_buffer: int = 0  # length penalty over this many tokens before the budget (2503.14476, eq. 13); 0: off
    overlong_factor: float = 1.0  # largest penalty


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError for settings that contradict each other and for groups of one where groups are compared."""
    if group_size == 1 and {"group", "by_length"} & {config.advantage_mean, config.advantage_std}:
        raise ValueError("advantages compare the completions of one prompt; set rollout.group_size to 2 or more")
    by_length = config.advantage_mean == "by_length"
    if by_length and config.advantage_std != "none":
        raise ValueError("advantage_mean 'by_length' is OPO's, which divides by nothing; set advantage_std to 'none'")
    if config.overlong_buffer < 0 or config.overlong_buffer > max_new_tokens:
        raise ValueError(
            f"overlong_buffer is {config.overlong_buffer}; give tokens within the budget of {max_new_tokens}, or 0"
        )

    if not (config.truncated_in_statistics or config.mask_truncated):
        raise ValueError(
            "truncated_in_statistics is off: set mask_truncated, for what has no part in them has no advantage"
        )

    def rewards_of(experience: Experience) -> Float[Array, " b"]:
        mask = experience.rollout.loss_mask
        rewards = experience.rewards - config.kl_coef * masked_sum(kl_in_reward(config, experience), mask, axis=-1)
        if config.overlong_buffer:
            rewards += soft_overlong_penalty(
                jnp.sum(mask, axis=-1),
                max_tokens=max_new_tokens,
                buffer_tokens=config.overlong_buffer,
                factor=config.overlong_factor,
            )
        return rewards

    def targets(moments: RunningMoments, experience: Experience) -> tuple[RunningMoments, Batch]:
        mask, rewards = experience.rollout.loss_mask, rewards_of(experience)
        # A row without completion tokens fills a step up: it has no part in statistics.
        rows, groups = jnp.any(mask, axis=-1), group_ids(rewards.shape[0], group_size)
        if not config.truncated_in_statistics:
            rows &= is_finished(experience)
            groups = jnp.where(rows, groups, -1 - jnp.arange(len(groups)))  # each alone
        moments = merge_moments(moments, moments_of(rewards, rows))
        advantages = normalize_rewards(
            rewards - opo_baseline(rewards, jnp.sum(mask, axis=-1), groups) if by_length else rewards,
            groups,
            rows,
            mean="none" if config.advantage_mean == "by_length" else config.advantage_mean,
            std=config.advantage_std,
            moments=moments,
        )
        if config.advantage_scale != "none":
            by_group = config.advantage_scale == "mixed_groups"
            counted = jnp.sum(rows & (mixed_groups(rewards, groups) if by_group else rewards != 0))
            advantages *= jnp.sum(rows) / jnp.maximum(counted, 1)
        return moments, policy_batch(config, experience, jnp.broadcast_to(advantages[:, None], mask.shape))

    return policy_algorithm(config, max_new_tokens, targets, empty_moments)
