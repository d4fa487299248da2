"""Policy losses per token, to be minimised, and the one-call forms made of them.

Every loss is [b, t] and goes through an ``Aggregation``; those of whole sequences stand repeated at each token, so that
SEQUENCE_MEAN_TOKEN_MEAN gives the mean over sequences. ``proximal_logprobs`` and advantages are constants; ρ = π /
π_prox. Functions without ``mask`` read single tokens: pass masked arrays through ``zero_masked`` first. GRPO is
``clipped_surrogate`` under SEQUENCE_MEAN_TOKEN_MEAN, DAPO and Lite PPO under TOKEN_MEAN, Dr. GRPO under
``constant_length`` with centred rewards; GPG is ``reinforce`` on ``gpg_advantages``.
"""

import jax
import jax.numpy as jnp
from jax import lax, nn
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from rljax.losses.kl import k3, log_ratio
from rljax.losses.masked import (
    SEQUENCE_MEAN_TOKEN_MEAN,
    TOKEN_MEAN,
    Aggregation,
    aggregate,
    at_least_float32,
    masked_mean,
    zero_masked,
)
from rljax.losses.shapes import check_shapes
from rljax.losses.value import clipped_value_loss

PerToken = Float[Array, "b t"]
Each = Float[Array, "*s"]  # entries by themselves: of any shape, one for all arrays
Mask = Bool[Array, "b t"]


@check_shapes
def reinforce(logprobs: Each, advantages: Each) -> Each:
    """``-A · log π`` (Williams 1992); the gradient is the point, the value is not."""
    return -advantages * at_least_float32(logprobs)


@check_shapes
def surrogate(logprobs: Each, proximal_logprobs: Each, advantages: Each) -> Each:
    """``-A ρ``, without a clip (1707.06347, eq. 6)."""
    return -advantages * jnp.exp(log_ratio(logprobs, proximal_logprobs))


@check_shapes
def clipped_surrogate(
    logprobs: Each, proximal_logprobs: Each, advantages: Each, eps_low: float, eps_high: float
) -> Each:
    """``max(-A ρ, -A clip(ρ, 1 - ε_low, 1 + ε_high))`` (1707.06347, eq. 7; two edges: DAPO, 2503.14476).

    The gradient is 0 above the upper edge where A > 0 and below the lower one where A < 0.
    """
    ratio = jnp.exp(log_ratio(logprobs, proximal_logprobs))
    return _pessimistic(ratio, advantages, eps_low, eps_high)


@check_shapes
def dual_clip(losses: Each, advantages: Each, ceiling: float) -> Each:
    """``min(loss, -c A)`` where A < 0: bounds what a large ratio can cost (1912.09729); c > 1, usually 3."""
    if not ceiling > 1:
        raise ValueError(f"dual_clip got ceiling={ceiling}; it bounds the ratio and must be above 1 (usually 3)")
    return jnp.where(advantages < 0, jnp.minimum(losses, -ceiling * advantages), losses)


@check_shapes
def is_clipped_low(logprobs: Each, proximal_logprobs: Each, advantages: Each, eps_low: float) -> Bool[Array, "*s"]:
    """Where the lower edge stops the gradient: ρ < 1 - ε_low and A < 0. Its masked mean is a clip fraction."""
    return (jnp.exp(log_ratio(logprobs, proximal_logprobs)) < 1 - eps_low) & (advantages < 0)


@check_shapes
def is_clipped_high(logprobs: Each, proximal_logprobs: Each, advantages: Each, eps_high: float) -> Bool[Array, "*s"]:
    """Where the upper edge stops the gradient: ρ > 1 + ε_high and A > 0."""
    return (jnp.exp(log_ratio(logprobs, proximal_logprobs)) > 1 + eps_high) & (advantages > 0)


@check_shapes
def gspo(
    logprobs: PerToken, proximal_logprobs: PerToken, advantages: PerToken, mask: Mask, eps_low: float, eps_high: float
) -> PerToken:
    """The clipped surrogate of ``s = exp(mean_t log ρ)`` (GSPO, 2507.18071, eq. 5 and 7), at each token of its row.

    Edges about 3e-4 and 4e-4. For SEQUENCE_MEAN_TOKEN_MEAN; an empty row gives 0 gradient.
    """
    ratio = jnp.exp(_mean_log_ratio(logprobs, proximal_logprobs, mask))
    return _pessimistic(ratio, zero_masked(mask, advantages), eps_low, eps_high)


@check_shapes
def gspo_token(
    logprobs: PerToken, proximal_logprobs: PerToken, advantages: PerToken, mask: Mask, eps_low: float, eps_high: float
) -> PerToken:
    """GSPO's token form: the value of ``s``, the gradient of each token's own log-prob (2507.18071, eq. 13 and 14).

    With one advantage a row it equals ``gspo`` in value and gradient; it exists for advantages that differ by token.
    """
    logprobs, proximal_logprobs, advantages = zero_masked(mask, logprobs, proximal_logprobs, advantages)
    sequence = lax.stop_gradient(_mean_log_ratio(logprobs, proximal_logprobs, mask))
    ratio = jnp.exp(sequence + (logprobs - lax.stop_gradient(logprobs)))
    return _pessimistic(ratio, advantages, eps_low, eps_high)


@check_shapes
def cispo(logprobs: Each, proximal_logprobs: Each, advantages: Each, eps_low: float, eps_high: float) -> Each:
    """``-sg[clip(ρ, 1 - ε_low, 1 + ε_high)] · A · log π``: every token keeps a gradient (CISPO, 2506.13585, eq. 4, 5).

    ``eps_low >= 1`` leaves the lower side open, as the paper does. For TOKEN_MEAN.
    """
    weight = jnp.clip(jnp.exp(log_ratio(logprobs, proximal_logprobs)), 1 - eps_low, 1 + eps_high)
    return -lax.stop_gradient(weight) * advantages * at_least_float32(logprobs)


@check_shapes
def gmpo(
    logprobs: PerToken, proximal_logprobs: PerToken, advantages: PerToken, mask: Mask, eps_low: float, eps_high: float
) -> PerToken:
    """``-A · exp(mean_t clip(log ρ, -ε_low, ε_high))``, clipped on the side that binds for the sign of A.

    The geometric mean of ratios (GMPO, 2507.20673), at each token of its row; edges are in log space, .4 in the paper.
    For SEQUENCE_MEAN_TOKEN_MEAN and one advantage a row.
    """
    logprobs, proximal_logprobs, advantages = zero_masked(mask, logprobs, proximal_logprobs, advantages)
    d = log_ratio(logprobs, proximal_logprobs)
    bounded = jnp.where(advantages > 0, jnp.minimum(d, eps_high), jnp.maximum(d, -eps_low))
    return -advantages * jnp.exp(masked_mean(bounded, mask, axis=-1)[:, None])


@check_shapes
def sapo(
    logprobs: Each, proximal_logprobs: Each, advantages: Each, tau_pos: float = 1.0, tau_neg: float = 1.05
) -> Each:
    """``-A · (4/τ) σ(τ (ρ - 1))``, τ by the sign of A: a soft gate for the clip (SAPO, 2511.20347, eq. 5 and 6).

    At ρ = 1 the gradient is that of ``-A ρ``. For SEQUENCE_MEAN_TOKEN_MEAN.
    """
    ratio = jnp.exp(log_ratio(logprobs, proximal_logprobs))
    tau = jnp.where(advantages > 0, tau_pos, tau_neg)
    return -advantages * (4 / tau) * nn.sigmoid(tau * (ratio - 1))


@check_shapes
def entropy_bonus(entropy: Each) -> Each:
    """``-H``: minimising it raises the entropy."""
    return -at_least_float32(entropy)


@check_shapes
def logprob_covariance(advantages: PerToken, logprobs: PerToken, mask: Mask) -> PerToken:
    """``(A - mean A)(l - mean l)`` of each kept token, 0 elsewhere (2505.22617).

    The means are over all tokens given: compute it on the whole optimizer step, before the cut into micro-batches.
    """
    advantages, logprobs = zero_masked(mask, advantages, logprobs)
    centred = (advantages - masked_mean(advantages, mask)) * (logprobs - masked_mean(logprobs, mask))
    return jnp.where(mask, centred, 0)


@check_shapes
def random_high_covariance(
    key: PRNGKeyArray, covariance: PerToken, eligible: Mask, *, count: Float[Array, ""], low: float, high: float
) -> Mask:
    """``count`` random tokens with ``low < cov < high`` for ``clip_cov`` (2505.22617; low 1, high 5).

    ``eligible`` are kept tokens, without those already clipped; the paper's count is .02 % of the kept tokens. Fewer
    are taken where fewer qualify.
    """
    candidates = eligible & (covariance > low) & (covariance < high)
    return _top(jax.random.uniform(key, covariance.shape), candidates, count)


@check_shapes
def highest_covariance(covariance: PerToken, mask: Mask, *, count: Float[Array, ""]) -> Mask:
    """The ``count`` kept tokens of highest covariance, for ``kl_cov`` (2505.22617; .02 % of the tokens)."""
    return _top(covariance, mask, count)


@check_shapes
def clip_cov(losses: Each, selected: Bool[Array, "*s"]) -> Each:
    """The loss without a gradient at the selected tokens (Clip-Cov, 2505.22617); its value stays."""
    return jnp.where(selected, lax.stop_gradient(losses), losses)


@check_shapes
def kl_cov(
    losses: Each, logprobs: Each, proximal_logprobs: Each, selected: Bool[Array, "*s"], coef: float = 1.0
) -> Each:
    """``loss + coef · |log ρ|`` at the selected tokens (KL-Cov, 2505.22617, as its code has it)."""
    return losses + jnp.where(selected, coef * jnp.abs(log_ratio(logprobs, proximal_logprobs)), 0)


def _pessimistic(ratio: Array, advantages: Array, eps_low: float, eps_high: float) -> Array:
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - eps_low, 1 + eps_high))


def _mean_log_ratio(logprobs: Array, proximal_logprobs: Array, mask: Array) -> Array:
    logprobs, proximal_logprobs = zero_masked(mask, logprobs, proximal_logprobs)
    return masked_mean(log_ratio(logprobs, proximal_logprobs), mask, axis=-1)[:, None]


def _top(scores: Array, candidates: Array, count: Array) -> Array:
    order = jnp.argsort(jnp.where(candidates, scores, -jnp.inf).ravel(), descending=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return candidates & (rank.reshape(scores.shape) < count)


@check_shapes
def grpo_loss(
    logprobs: PerToken,
    behavior_logprobs: PerToken,
    advantages: PerToken,
    loss_mask: Mask,
    ref_logprobs: PerToken | None = None,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    kl_coef: float = 0.04,
    aggregation: Aggregation = SEQUENCE_MEAN_TOKEN_MEAN,
) -> Float[Array, ""]:
    """GRPO in one call (2402.03300, eq. 3): clipped surrogate + kl_coef · k3 to the reference, if there is one.

    Divided by the non-empty rows of this batch, or as ``aggregation`` says; an empty mask gives 0. DAPO:
    ``eps_high=.28, aggregation=TOKEN_MEAN`` and no reference.
    """
    logprobs, behavior_logprobs, advantages = zero_masked(loss_mask, logprobs, behavior_logprobs, advantages)
    losses = clipped_surrogate(logprobs, behavior_logprobs, advantages, eps_low, eps_high)
    if ref_logprobs is not None:
        losses += kl_coef * k3(logprobs, zero_masked(loss_mask, ref_logprobs))
    return aggregate(aggregation, losses, loss_mask)


@check_shapes
def ppo_loss(
    logprobs: PerToken,
    behavior_logprobs: PerToken,
    advantages: PerToken,
    loss_mask: Mask,
    values: PerToken,
    behavior_values: PerToken,
    returns: PerToken,
    *,
    eps: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    aggregation: Aggregation = TOKEN_MEAN,
) -> Float[Array, ""]:
    """PPO in one call (1707.06347, eq. 9): clipped surrogate + value_coef · clipped value loss.

    Divided by the kept tokens of this batch, or as ``aggregation`` says; an empty mask gives 0. ``advantages`` and
    ``returns`` come from ``gae``, the former whitened where the recipe does so.
    """
    logprobs, behavior_logprobs, advantages = zero_masked(loss_mask, logprobs, behavior_logprobs, advantages)
    values, behavior_values, returns = zero_masked(loss_mask, values, behavior_values, returns)
    losses = clipped_surrogate(logprobs, behavior_logprobs, advantages, eps, eps)
    losses += value_coef * clipped_value_loss(values, behavior_values, returns, value_clip)
    return aggregate(aggregation, losses, loss_mask)
