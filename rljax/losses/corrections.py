"""Importance weights for samples of a policy other than the trainer's: the sampler's precision, truncation, staleness.

``w = π_prox / π_behavior``, a constant that multiplies a policy loss; the clip's own ratio is π / π_prox. Choose what
the weight is of (a token, a sequence) and what becomes of large ones (truncated, masked, IcePop). Decoupled PPO
(2110.00641) is ``importance_weights`` as they are, times ``clipped_surrogate``. Masked entries weigh 0.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rljax.losses.kl import log_ratio
from rljax.losses.masked import masked_mean, masked_sum, zero_masked
from rljax.losses.shapes import check_shapes

PerToken = Float[Array, "b t"]
Each = Float[Array, "*s"]  # entries by themselves: of any shape, one for all arrays


@check_shapes
def importance_weights(proximal_logprobs: PerToken, behavior_logprobs: PerToken, mask: Bool[Array, "b t"]) -> PerToken:
    """``w`` of each token."""
    return _weights(_log_weights(proximal_logprobs, behavior_logprobs, mask), mask)


@check_shapes
def sequence_importance_weights(
    proximal_logprobs: PerToken, behavior_logprobs: PerToken, mask: Bool[Array, "b t"]
) -> PerToken:
    """The product of a row's token weights, at each of its tokens: unbiased, of high variance."""
    total = masked_sum(_log_weights(proximal_logprobs, behavior_logprobs, mask), mask, axis=-1)
    return _weights(log_ratio(total[:, None], jnp.zeros_like(total[:, None])), mask)


@check_shapes
def geometric_importance_weights(
    proximal_logprobs: PerToken, behavior_logprobs: PerToken, mask: Bool[Array, "b t"]
) -> PerToken:
    """The geometric mean of a row's token weights, at each of its tokens."""
    mean = masked_mean(_log_weights(proximal_logprobs, behavior_logprobs, mask), mask, axis=-1)
    return _weights(mean[:, None], mask)


@check_shapes
def truncated_importance(weights: Each, cap: float) -> Each:
    """``min(w, cap)`` (TIS; IMPALA's ρ, 1802.01561)."""
    return jnp.minimum(weights, cap)


@check_shapes
def masked_importance(weights: Each, cap: float) -> Each:
    """``w · 1[w <= cap]`` (MIS): what is too far off policy leaves the loss."""
    return jnp.where(weights <= cap, weights, 0)


@check_shapes
def icepop(weights: Each, low: float, high: float) -> Each:
    """``w · 1[low <= w <= high]`` (IcePop, 2510.18855)."""
    return jnp.where((weights >= low) & (weights <= high), weights, 0)


def _log_weights(proximal_logprobs: Array, behavior_logprobs: Array, mask: Array) -> Array:
    return lax.stop_gradient(log_ratio(*zero_masked(mask, proximal_logprobs, behavior_logprobs)))


def _weights(log_weights: Array, mask: Array) -> Array:
    return jnp.where(mask, jnp.exp(log_weights), 0)
