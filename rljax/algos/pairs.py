"""Shared by algorithms on pairs: rows 2i are chosen, rows 2i + 1 rejected, and all report the same metrics."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from rljax.algos.base import Batch
from rljax.losses.logprobs import sequence_logprobs
from rljax.losses.masked import masked_mean, masked_sum
from rljax.losses.preferences import valid_pairs
from rljax.types import Term

PerPair = Float[Array, " pairs"]
Sides = tuple[PerPair, PerPair]


def sides(x: Shaped[Array, "b ..."]) -> tuple[Any, Any]:
    """Chosen and rejected rows."""
    pairs = x.reshape(x.shape[0] // 2, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def on_rows(chosen: PerPair, rejected: PerPair) -> Float[Array, " b"]:
    """The inverse of ``sides``."""
    return jnp.stack([chosen, rejected], axis=1).reshape(-1)


def kept_pairs(loss_mask: Bool[Array, "b t"]) -> Bool[Array, " pairs"]:
    """Pairs with a token on both sides: those that count."""
    return valid_pairs(*sides(loss_mask))


def sums(logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Sides:
    """Log-probs of whole completions."""
    return sides(sequence_logprobs(logprobs, mask))


def means(logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Sides:
    """Log-probs a token."""
    return sides(masked_mean(logprobs, mask, axis=-1))


def count_pairs(loss_mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    return jnp.sum(kept_pairs(loss_mask)).astype(jnp.float32)


def prepare_pairs(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
    """For losses that cross no pairs."""
    return state, batch, {"pairs": count_pairs(batch["loss_mask"])}


def pair_metrics(rewards: Sides, logprobs: Sides, kept: Bool[Array, " pairs"]) -> dict[str, Term]:
    """Rewards as the loss sees them and log-probs as it takes them, means over the step's pairs."""
    chosen, rejected = rewards
    values = {
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).astype(jnp.float32),
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "logprob_chosen": logprobs[0],
        "logprob_rejected": logprobs[1],
    }
    return {name: Term(masked_sum(value, kept), "pairs", 0.0) for name, value in values.items()}
