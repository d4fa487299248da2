"""The critic in online algorithms: value losses by name, and its outputs as one number."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.algos.base import Algorithm, Batch
from rljax.losses.masked import count_tokens, masked_sum, masked_var, zero_masked
from rljax.losses.value import (
    clipped_value_loss,
    huber_value_loss,
    squared_value_loss,
    two_hot_cross_entropy,
    two_hot_value,
    value_bins,
)
from rljax.types import Experience, Outputs, Term

PerToken = Float[Array, "b t"]


@dataclass(frozen=True, kw_only=True)
class CriticLossConfig:
    """What the losses of critics share."""

    value_coef: float  # weight of the value loss
    value_clip: float  # clipped: largest change of a value since the rollout
    value_loss: Literal["clipped", "squared", "huber", "two_hot"] = (
        "clipped"  # two_hot: cross entropy over bins of symlog returns (2310.17805), without a clip
    )
    huber_delta: float = 1.0  # huber: where the loss becomes linear
    value_bins: int = 256  # two_hot: number of bins
    value_ema_coef: float = 0.0  # weight of a loss towards a moving average of the critic; 0: off
    value_ema_decay: float = 0.98  # decay of that average per optimizer step (2301.04104), updated after each rollout


def with_critic(config: CriticLossConfig, algorithm: Algorithm) -> Algorithm:
    """With a critic beside the policy, whose loss is part of it already. Raises ValueError for a decay of no mean."""
    if config.value_ema_coef and not 0 < config.value_ema_decay < 1:
        raise ValueError(f"value_ema_decay is {config.value_ema_decay}; a running mean has one between 0 and 1")
    return algorithm._replace(
        needs=algorithm.needs | {"values"},
        trains=("policy", "critic"),
        critic_outputs=config.value_bins if config.value_loss == "two_hot" else 1,
        critic_ema=config.value_ema_decay if config.value_ema_coef else 0.0,
    )


def as_value(config: CriticLossConfig, values: Float[Array, "*s"] | Float[Array, "*s n"]) -> Float[Array, "*s"]:
    """A critic's outputs on the scale of returns: what GAE takes."""
    return two_hot_value(values, value_bins(config.value_bins)) if config.value_loss == "two_hot" else values


def critic_batch(config: CriticLossConfig, experience: Experience, values: PerToken, returns: PerToken) -> Batch:
    """The columns that ``value_terms`` reads beside the loss mask."""
    mask = experience.rollout.loss_mask
    explained = jnp.broadcast_to(explained_variance(values, returns, mask), mask.shape[:1])
    batch = {"returns": returns, "behavior_values": values, "explained_variance": explained}
    if config.value_ema_coef:
        assert experience.ema_values is not None  # critic_ema asks for them
        batch["ema_values"] = as_value(config, experience.ema_values)
    return batch


def value_terms(config: CriticLossConfig, outputs: Outputs, batch: Batch) -> dict[str, Term]:
    """The loss of the critic against ``returns``, mean over tokens; ``behavior_values`` are the rollout's.

    ``explained_variance`` [b] is what ``critic_batch`` found of the whole rollout.
    """
    assert outputs.values is not None  # a critic is trained
    mask = batch["loss_mask"]
    old, returns = zero_masked(mask, batch["behavior_values"], batch["returns"])
    said = zero_masked(mask[..., None] if config.value_loss == "two_hot" else mask, outputs.values)
    values, losses, terms = as_value(config, said), _towards(config, said, returns), {}
    if config.value_loss == "clipped":
        losses = clipped_value_loss(values, old, returns, config.value_clip)
        far = mask & (jnp.abs(values - old) > config.value_clip)
        terms["value_clip_fraction"] = Term(count_tokens(far), "tokens", 0.0)
    if config.value_ema_coef:
        apart = _towards(config, said, zero_masked(mask, batch["ema_values"]))
        terms["value_ema"] = Term(masked_sum(apart, mask), "tokens", config.value_coef * config.value_ema_coef)
    explained = jnp.broadcast_to(batch["explained_variance"][:, None], mask.shape)
    return terms | {
        "explained_variance": Term(masked_sum(explained, mask), "tokens", 0.0),
        "value": Term(masked_sum(losses, mask), "tokens", config.value_coef),
        "value_mean": Term(masked_sum(values, mask), "tokens", 0.0),
        "return_mean": Term(masked_sum(returns, mask), "tokens", 0.0),
    }


def _towards(config: CriticLossConfig, said: PerToken | Float[Array, "b t n"], target: PerToken) -> PerToken:
    """The loss by its name, without a clip, of what the critic said."""
    if config.value_loss == "two_hot":
        return two_hot_cross_entropy(said, target, value_bins(config.value_bins))
    if config.value_loss == "huber":
        return huber_value_loss(said, target, config.huber_delta)
    return squared_value_loss(said, target)


def explained_variance(values: PerToken, returns: PerToken, mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    """``1 - Var(R - V) / Var(R)``, biased: 1 is a perfect critic, 0 knows the mean; constant returns give 0."""
    values, returns = zero_masked(mask, values, returns)
    spread = masked_var(returns, mask, ddof=0)
    left = masked_var(returns - values, mask, ddof=0)
    return jnp.where(spread > 0, 1 - left / jnp.where(spread > 0, spread, 1), 0)
