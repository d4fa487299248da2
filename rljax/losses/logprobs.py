"""Log-probabilities and entropy from logits.

Everywhere the distribution is ``softmax(logits / temperature)`` in float32 (float64 stays float64).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rljax.losses.masked import at_least_float32, masked_sum
from rljax.losses.shapes import check_shapes


class LogprobStats(NamedTuple):
    """What one pass over the vocabulary gives each token, in float32; ``entropy`` is None if not asked for."""

    logprobs: Float[Array, "*n"]
    entropy: Float[Array, "*n"] | None


@check_shapes
def log_normalizer(logits: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """``log Σ_v exp(logits_v)``."""
    return jax.nn.logsumexp(at_least_float32(logits), axis=-1)


@check_shapes
def token_logprobs(
    logits: Float[Array, "*n v"], tokens: Int[Array, "*n"], temperature: float = 1.0
) -> Float[Array, "*n"]:
    """``log softmax(logits / temperature)[token]``; ``logits[t]`` is what *predicts* ``tokens[t]``.

    A token outside the vocabulary gets a finite number without meaning: mask it.
    """
    scaled = at_least_float32(logits) / temperature
    return select(scaled, token_mask(scaled, tokens)) - log_normalizer(scaled)


@check_shapes
def truncated_logprobs(
    logits: Float[Array, "*n v"], tokens: Int[Array, "*n"], support: Float[Array, "*n"], temperature: float = 1.0
) -> Float[Array, "*n"]:
    """Log-probs renormalised on the kept set of truncated sampling, ``{v: logits_v / temperature >= support}``.

    ``support`` is -inf where nothing was cut. The token itself always belongs to the set: it was sampled from it, and
    rounding must not push it out.
    """
    scaled = at_least_float32(logits) / temperature
    is_token = token_mask(scaled, tokens)
    return select(scaled, is_token) - log_normalizer(keep_support(scaled, support, is_token))


@check_shapes
def entropy(logits: Float[Array, "*n v"], temperature: float = 1.0) -> Float[Array, "*n"]:
    """``-Σ_v p_v log p_v`` in nats, over the full vocabulary; logits of -inf count as absent."""
    scaled = at_least_float32(logits) / temperature
    return entropy_from(scaled, log_normalizer(scaled))


@check_shapes
def sequence_logprobs(logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, " b"]:
    """Sum of the kept tokens' log-probs; an empty row gives 0."""
    return masked_sum(logprobs, mask, axis=-1)


def token_mask(logits: Array, tokens: Array) -> Array:
    # A comparison, not a gather: the partitioner keeps a sharded vocabulary where it is.
    return lax.broadcasted_iota(tokens.dtype, logits.shape, logits.ndim - 1) == tokens[..., None]


def select(logits: Array, is_token: Array) -> Array:
    return jnp.sum(jnp.where(is_token, logits, 0), axis=-1)


def keep_support(scaled: Array, support: Array, is_token: Array) -> Array:
    return jnp.where((scaled >= support[..., None]) | is_token, scaled, -jnp.inf)


def entropy_from(scaled: Array, normalizer: Array) -> Array:
    logp = scaled - normalizer[..., None]
    return -jnp.sum(jnp.exp(logp) * without_inf(logp), axis=-1)


def without_inf(logp: Array) -> Array:
    """Finite, so that 0 log 0 = 0; below -1e4 a probability is 0 in every float. A maximum is vectorised on CPUs."""
    return jnp.maximum(logp, -1e4)
