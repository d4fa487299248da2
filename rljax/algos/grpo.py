"""GRPO (2402.03300) and what is made of its pieces: Dr. GRPO (2503.20783), DAPO (2503.14476), Lite PPO (2508.08221)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch
from rljax.losses.advantages import (
    RunningMoments,
    empty_moments,
    group_ids,
    merge_moments,
    moments_of,
    normalize_rewards,
)
from rljax.losses.kl import k3
from rljax.losses.masked import AGGREGATIONS, Aggregation, constant_length, count_tokens, masked_sum, zero_masked
from rljax.losses.policy import clipped_surrogate, dual_clip, is_clipped_high, is_clipped_low
from rljax.types import FINISH_END, Experience, Outputs, Term

Statistic = Literal["group", "batch", "running", "none"]
AggregationName = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"]


@dataclass(frozen=True, kw_only=True)
class Config:
    kl_coef: float  # of k3 against the reference, in the loss; 0 loads no reference
    clip_low: float  # the ratio is clipped below 1 - clip_low
    clip_high: float  # the ratio is clipped above 1 + clip_high
    advantage_mean: Statistic  # what is subtracted from a reward
    advantage_std: Statistic  # what it is divided by; batch is of the raw rewards
    aggregation: AggregationName  # how the losses of tokens become one number
    dual_clip: float | None = None  # bound of the loss where the advantage is negative (1912.09729); usually 3
    entropy_coef: float = 0.0  # of the entropy, which is rewarded
    mask_truncated: bool = False  # completions cut by the budget count in the statistics and not in the loss


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError where a statistic of a group is asked for and groups have one member."""
    if group_size == 1 and "group" in (config.advantage_mean, config.advantage_std):
        raise ValueError("advantages compare the completions of one prompt; set rollout.group_size to 2 or more")
    aggregation = _aggregation(config.aggregation, max_new_tokens)

    def targets(moments: RunningMoments, experience: Experience) -> tuple[RunningMoments, Batch]:
        rollout, rewards = experience.rollout, experience.rewards
        mask = rollout.loss_mask
        # A row without completion tokens fills a step up: it has no part in statistics. Truncated rows have theirs.
        rows = jnp.any(mask, axis=-1)
        moments = merge_moments(moments, moments_of(rewards, rows))
        advantages = normalize_rewards(
            rewards,
            group_ids(rewards.shape[0], group_size),
            rows,
            mean=config.advantage_mean,
            std=config.advantage_std,
            moments=moments,
        )
        if config.mask_truncated:
            mask = mask & (rollout.finish_reason == FINISH_END)[:, None]
        batch = {
            "tokens": rollout.tokens,
            "valid": rollout.valid,
            "loss_mask": mask,
            "support": rollout.support,
            "behavior_logprobs": rollout.behavior_logprobs,
            "advantages": jnp.broadcast_to(advantages[:, None], mask.shape),
        }
        if config.kl_coef:
            assert experience.ref_logprobs is not None  # it is in needs
            batch["ref_logprobs"] = experience.ref_logprobs
        return moments, jax.lax.stop_gradient(batch)

    def prepare(moments: RunningMoments, batch: Batch, key: Array) -> tuple[RunningMoments, Batch, dict]:
        return moments, batch, {"aggregated": aggregation.denominator(batch["loss_mask"])}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.logprobs is not None and outputs.entropy is not None  # it is in needs
        mask = batch["loss_mask"]
        logprobs, entropy, old, advantages = zero_masked(
            mask, outputs.logprobs, outputs.entropy, batch["behavior_logprobs"], batch["advantages"]
        )
        surrogate = clipped_surrogate(logprobs, old, advantages, config.clip_low, config.clip_high)
        if config.dual_clip:
            surrogate = dual_clip(surrogate, advantages, config.dual_clip)
        terms = {
            "policy": Term(aggregation.numerator(surrogate, mask), "aggregated"),
            "clip_fraction_low": Term(
                count_tokens(mask & is_clipped_low(logprobs, old, advantages, config.clip_low)), "tokens", 0.0
            ),
            "clip_fraction_high": Term(
                count_tokens(mask & is_clipped_high(logprobs, old, advantages, config.clip_high)), "tokens", 0.0
            ),
            "entropy": Term(masked_sum(entropy, mask), "tokens", 0.0),
        }
        if config.entropy_coef:
            terms["entropy_bonus"] = Term(aggregation.numerator(entropy, mask), "aggregated", -config.entropy_coef)
        if config.kl_coef:
            # Between the whole distributions, also where sampling truncates: the ratio alone is on the support.
            full = outputs.logprobs if outputs.full_logprobs is None else outputs.full_logprobs
            kl = k3(*zero_masked(mask, full, batch["ref_logprobs"]))
            terms["kl"] = Term(aggregation.numerator(kl, mask), "aggregated", config.kl_coef)
        return terms

    needs = {"entropy"} | ({"ref_logprobs"} if config.kl_coef else set())
    return Algorithm(needs=frozenset(needs), init=empty_moments, targets=targets, prepare=prepare, loss=loss)


def _aggregation(name: str, max_new_tokens: int) -> Aggregation:
    if name == "constant_length":
        return constant_length(max_new_tokens)
    chosen = AGGREGATIONS[name]
    assert isinstance(chosen, Aggregation)
    return chosen
