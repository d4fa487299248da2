"""Estimators of KL(π‖ref) from sampled tokens, exact divergences of whole rows, controllers of the coefficient.

``d = logprobs - ref_logprobs``, clamped to ±40, per token and in nats. Equal in value is not equal in gradient: for one
token with its prefix fixed and sampled from π, E∇k1 = 0, E∇k2 = E∇k4 = ∇KL(π‖ref), E∇k3 = ∇KL(ref‖π). So k1 belongs in
the reward (there it gives the gradient of the whole sequence's KL), k2 or k3 in the loss. None takes a mask: see
``masked.zero_masked``.
"""

import jax.numpy as jnp
from jax import lax, nn
from jaxtyping import Array, Float

from rljax.losses.masked import at_least_float32
from rljax.losses.shapes import check_shapes

CLAMP = 40.0  # exp(40) is finite in float32 and far outside anything that trains


@check_shapes
def log_ratio(logprobs: Float[Array, "*s"], other_logprobs: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``logprobs - other_logprobs`` clamped to ±40, in float32 or wider; the gradient is 0 outside."""
    return jnp.clip(at_least_float32(logprobs) - at_least_float32(other_logprobs), -CLAMP, CLAMP)


@check_shapes
def k1(logprobs: Float[Array, "*s"], ref_logprobs: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``d``: unbiased, of either sign; for the reward, useless as a loss (E∇ = 0). joschu.net/blog/kl-approx.html."""
    return log_ratio(logprobs, ref_logprobs)


@check_shapes
def k2(logprobs: Float[Array, "*s"], ref_logprobs: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``d² / 2 >= 0``: biased in value, unbiased in gradient. joschu.net/blog/kl-approx.html."""
    return jnp.square(log_ratio(logprobs, ref_logprobs)) / 2


@check_shapes
def k3(logprobs: Float[Array, "*s"], ref_logprobs: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``exp(-d) - 1 + d >= 0``: unbiased, of low variance; GRPO's penalty (2402.03300, eq. 4)."""
    d = log_ratio(logprobs, ref_logprobs)
    return jnp.expm1(-d) + d


@check_shapes
def k4(
    logprobs: Float[Array, "*s"], ref_logprobs: Float[Array, "*s"], sampled_logprobs: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """``ρ · d`` with ρ = π / π_sampled: k1 corrected for who sampled the token, unbiased in value and gradient."""
    return jnp.exp(log_ratio(logprobs, lax.stop_gradient(sampled_logprobs))) * log_ratio(logprobs, ref_logprobs)


@check_shapes
def straight_through(logprobs: Float[Array, "*s"], ref_logprobs: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The value of k3 with the gradient of k2."""
    gradient = k2(logprobs, ref_logprobs)
    return lax.stop_gradient(k3(logprobs, ref_logprobs)) + (gradient - lax.stop_gradient(gradient))


@check_shapes
def full_kl(logits: Float[Array, "*n v"], ref_logits: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """Exact ``KL(π‖ref) = Σ_v π_v (log π_v - log ref_v)`` in nats; logits of -inf in ``logits`` count as absent."""
    logp = nn.log_softmax(at_least_float32(logits), axis=-1)
    logq = nn.log_softmax(at_least_float32(ref_logits), axis=-1)
    return _expected_difference(logp, logq)


@check_shapes
def jensen_shannon(
    logits: Float[Array, "*n v"], other_logits: Float[Array, "*n v"], weight: float = 0.5
) -> Float[Array, "*n"]:
    """``w KL(p‖m) + (1 - w) KL(q‖m)`` with ``m = w p + (1 - w) q``, 0 < w < 1 (GKD, 2306.13649, eq. 1).

    At 1/2 it is symmetric and at most ln 2.
    """
    if not 0 < weight < 1:
        raise ValueError(f"jensen_shannon got weight={weight}; use one inside (0, 1), or full_kl for either end")
    logp = nn.log_softmax(at_least_float32(logits), axis=-1)
    logq = nn.log_softmax(at_least_float32(other_logits), axis=-1)
    floor = jnp.finfo(logp.dtype).min / 2  # two -inf would make the gradient of logaddexp NaN
    logm = jnp.logaddexp(jnp.maximum(logp, floor) + jnp.log(weight), jnp.maximum(logq, floor) + jnp.log1p(-weight))
    return weight * _expected_difference(logp, logm) + (1 - weight) * _expected_difference(logq, logm)


def _expected_difference(logp: Array, logq: Array) -> Array:
    present = ~jnp.isneginf(logp)
    logp, logq = jnp.where(present, logp, 0), jnp.where(present, logq, 0)
    return jnp.sum(jnp.where(present, jnp.exp(logp) * (logp - logq), 0), axis=-1)


@check_shapes
def fixed_kl_coef(coef: Float[Array, ""], kl: Float[Array, ""]) -> Float[Array, ""]:
    """The coefficient after a step that measured ``kl``: the same."""
    del kl
    return coef


@check_shapes
def adaptive_kl_coef(
    coef: Float[Array, ""], kl: Float[Array, ""], *, target_kl: float, horizon: float, n_samples: int
) -> Float[Array, ""]:
    """``coef · (1 + clip(kl / target - 1, ±.2) · n_samples / horizon)`` (1909.08593, section 2.2).

    ``kl`` in nats a completion, measured on the ``n_samples`` completions of the step; ``coef`` is the state.
    """
    error = jnp.clip(kl / target_kl - 1, -0.2, 0.2)
    return coef * (1 + error * n_samples / horizon)
