"""The critic's part of an online loss: value losses by name, and what a critic's head says as one number."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.algos.base import Batch
from rljax.losses.masked import count_tokens, masked_sum, masked_var, zero_masked
from rljax.losses.value import (
    clipped_value_loss,
    huber_value_loss,
    squared_value_loss,
    two_hot_cross_entropy,
    two_hot_value,
    value_bins,
)
from rljax.types import Outputs, Term

PerToken = Float[Array, "b t"]


@dataclass(frozen=True, kw_only=True)
class CriticLossConfig:
    """What the losses of critics share."""

    value_coef: float  # of the value loss
    value_clip: float  # clipped: how far a value counts as having moved since the rollout
    value_loss: Literal["clipped", "squared", "huber", "two_hot"] = (
        "clipped"  # two_hot: cross entropy over bins of symlog returns (2310.17805); it knows no clip
    )
    huber_delta: float = 1.0  # huber: where the loss goes from quadratic to linear
    value_bins: int = 256  # two_hot: outputs of the critic's head


def critic_outputs(config: CriticLossConfig) -> int:
    """How many numbers the critic's head gives at a position."""
    return config.value_bins if config.value_loss == "two_hot" else 1


def as_value(config: CriticLossConfig, values: Float[Array, "*s"] | Float[Array, "*s n"]) -> Float[Array, "*s"]:
    """A critic's outputs on the scale of returns: what GAE takes."""
    return two_hot_value(values, value_bins(config.value_bins)) if config.value_loss == "two_hot" else values


def critic_batch(values: PerToken, returns: PerToken, mask: Bool[Array, "b t"]) -> Batch:
    """The columns that ``value_terms`` reads beside the loss mask."""
    explained = jnp.broadcast_to(explained_variance(values, returns, mask), mask.shape[:1])
    return {"returns": returns, "behavior_values": values, "explained_variance": explained}


def value_terms(config: CriticLossConfig, outputs: Outputs, batch: Batch) -> dict[str, Term]:
    """The loss of the critic against ``returns``, mean over tokens; ``behavior_values`` are the rollout's.

    ``explained_variance`` [b] is what ``critic_batch`` found of the whole rollout.
    """
    assert outputs.values is not None  # a critic is trained
    mask = batch["loss_mask"]
    old, returns = zero_masked(mask, batch["behavior_values"], batch["returns"])
    terms = {}
    if config.value_loss == "two_hot":
        bins = value_bins(config.value_bins)
        logits = zero_masked(mask[..., None], outputs.values)
        losses, values = two_hot_cross_entropy(logits, returns, bins), two_hot_value(logits, bins)
    else:
        values = zero_masked(mask, outputs.values)
        losses = {
            "clipped": lambda: clipped_value_loss(values, old, returns, config.value_clip),
            "squared": lambda: squared_value_loss(values, returns),
            "huber": lambda: huber_value_loss(values, returns, config.huber_delta),
        }[config.value_loss]()
    if config.value_loss == "clipped":
        far = mask & (jnp.abs(values - old) > config.value_clip)
        terms["value_clip_fraction"] = Term(count_tokens(far), "tokens", 0.0)
    explained = jnp.broadcast_to(batch["explained_variance"][:, None], mask.shape)
    return terms | {
        "explained_variance": Term(masked_sum(explained, mask), "tokens", 0.0),
        "value": Term(masked_sum(losses, mask), "tokens", config.value_coef),
        "value_mean": Term(masked_sum(values, mask), "tokens", 0.0),
        "return_mean": Term(masked_sum(returns, mask), "tokens", 0.0),
    }


def explained_variance(values: PerToken, returns: PerToken, mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    """``1 - Var(R - V) / Var(R)``, biased: 1 is a perfect critic, 0 knows the mean; constant returns give 0."""
    values, returns = zero_masked(mask, values, returns)
    spread = masked_var(returns, mask, ddof=0)
    left = masked_var(returns - values, mask, ddof=0)
    return jnp.where(spread > 0, 1 - left / jnp.where(spread > 0, spread, 1), 0)
