"""Reward model losses: pairs, rankings of K answers, outcomes at every prefix, steps; pessimism and calibration.

Rewards are scores of whole answers, losses are to be minimised and come one number a row, which the caller sums and
divides by the rows of the whole optimizer step; the ``_loss`` forms do that for one batch and give 0 without a row.
Masked entries may hold anything, NaN included.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.losses.masked import at_least_float32, masked_mean, masked_sum, zero_masked
from rljax.losses.shapes import check_shapes

# --- Pairs ---


@check_shapes
def bradley_terry(
    chosen_rewards: Float[Array, " b"], rejected_rewards: Float[Array, " b"], margin: Float[Array, " b"] | float = 0.0
) -> Float[Array, " b"]:
    """``−log σ(r_w − r_l − m)`` (2203.02155, eq. 1; the margin m 2307.09288, eq. 2)."""
    return -jax.nn.log_sigmoid(at_least_float32(chosen_rewards) - at_least_float32(rejected_rewards) - margin)


@check_shapes
def centering_penalty(chosen_rewards: Float[Array, " b"], rejected_rewards: Float[Array, " b"]) -> Float[Array, " b"]:
    """``(r_w + r_l)²``, which fixes the free constant of pairwise rewards at mean 0 (2312.09244, eq. 2)."""
    return jnp.square(at_least_float32(chosen_rewards) + at_least_float32(rejected_rewards))


@check_shapes
def bradley_terry_loss(
    chosen_rewards: Float[Array, " b"],
    rejected_rewards: Float[Array, " b"],
    pair_mask: Bool[Array, " b"] | None = None,
    *,
    margin: Float[Array, " b"] | float = 0.0,
    centering_coef: float = 0.0,
) -> Float[Array, ""]:
    """``bradley_terry`` plus ``c · centering_penalty``, mean over the pairs kept (2203.02155, eq. 1)."""
    mask = jnp.ones(chosen_rewards.shape, bool) if pair_mask is None else pair_mask
    chosen, rejected = zero_masked(mask, chosen_rewards, rejected_rewards)
    pairs = bradley_terry(chosen, rejected, jnp.where(mask, margin, 0))
    losses = pairs + centering_coef * centering_penalty(chosen, rejected)
    return masked_mean(losses, mask)


# --- Rankings of K answers, ragged K ---


@check_shapes
def rank_order(scores: Float[Array, "b k"], mask: Bool[Array, "b k"]) -> Int[Array, "b k"]:
    """Indices that put a row's answers best first and the masked ones last; equal scores keep their order."""
    return jnp.argsort(jnp.where(mask, -at_least_float32(scores), jnp.inf), axis=-1)


@check_shapes
def plackett_luce(ranked_rewards: Float[Array, "b k"], mask: Bool[Array, "b k"]) -> Float[Array, " b"]:
    """``−Σ_k [r_k − log Σ_{j>=k} e^{r_j}]``, −log P(the ranking), answers best first (2301.11270, K-wise MLE).

    Masked entries are not there, wherever they stand; ``rank_order`` sorts. K = 2 is ``bradley_terry``; one answer or
    none gives 0.
    """
    rewards = zero_masked(mask, ranked_rewards)
    absent = -1e30  # in place of -inf, whose difference is NaN
    suffix = jax.lax.cumlogsumexp(jnp.where(mask, rewards, absent), axis=1, reverse=True)
    return masked_sum(suffix - rewards, mask, axis=-1)


@check_shapes
def pairwise_split(ranked_rewards: Float[Array, "b k"], mask: Bool[Array, "b k"]) -> Float[Array, " b"]:
    """``−Σ_{i<j} log σ(r_i − r_j) / C(K, 2)``, answers best first (2203.02155, eq. 1; 2301.11270, MLE₂).

    All pairs of one ranking stay in one row, each row weighs the same. Consistent, less efficient than
    ``plackett_luce``. One answer or none gives 0.
    """
    rewards = zero_masked(mask, ranked_rewards)
    k = rewards.shape[-1]
    pairs = mask[:, :, None] & mask[:, None, :] & jnp.triu(jnp.ones((k, k), bool), 1)
    losses = -jax.nn.log_sigmoid(rewards[:, :, None] - rewards[:, None, :])
    return jnp.sum(jnp.where(pairs, losses, 0), axis=(1, 2)) / jnp.maximum(jnp.sum(pairs, axis=(1, 2)), 1)


@check_shapes
def rankings(mask: Bool[Array, "b k"]) -> Bool[Array, " b"]:
    """Rows of at least two answers: those that a mean over rankings counts."""
    return jnp.sum(mask, axis=-1) >= 2


@check_shapes
def plackett_luce_loss(ranked_rewards: Float[Array, "b k"], mask: Bool[Array, "b k"]) -> Float[Array, ""]:
    """``plackett_luce``, mean over rows of at least two answers (2301.11270)."""
    return masked_mean(plackett_luce(ranked_rewards, mask), rankings(mask))


# --- Outcomes and steps: binary classification ---


@check_shapes
def binary_cross_entropy(
    logits: Float[Array, "*s"], labels: Float[Array, "*s"] | Bool[Array, "*s"], mask: Bool[Array, "*s"]
) -> Float[Array, "*s"]:
    """``−y log σ(z) − (1−y) log σ(−z)``, y in [0, 1]; 0 where masked (2312.08935, ORM and PRM losses)."""
    logits, labels = zero_masked(mask, logits, labels)
    return jnp.where(mask, jax.nn.softplus(logits) - labels * logits, 0)


@check_shapes
def outcome_loss(
    logits: Float[Array, "b t"], correct: Bool[Array, " b"], loss_mask: Bool[Array, "b t"]
) -> Float[Array, ""]:
    """ORM: ``binary_cross_entropy`` of "this answer is correct" at every prefix, mean over tokens (2403.04642).

    The logit at t judges the prefix that ends with token t (2110.14168 trains so at every token). An empty mask
    gives 0.
    """
    labels = jnp.broadcast_to(correct[:, None], logits.shape)
    return masked_mean(binary_cross_entropy(logits, labels, loss_mask), loss_mask)


@check_shapes
def process_loss(
    step_logits: Float[Array, "b s"],
    step_labels: Float[Array, "b s"] | Bool[Array, "b s"],
    step_mask: Bool[Array, "b s"],
) -> Float[Array, ""]:
    """PRM: ``binary_cross_entropy`` of "this step is right" at each step's end, mean over steps (2305.20050).

    An empty mask gives 0.
    """
    return masked_mean(binary_cross_entropy(step_logits, step_labels, step_mask), step_mask)


# --- Pessimism: how far the data covers a feature ---


class FeatureCovariance(NamedTuple):
    """Sum of outer products of feature differences and the number of comparisons; Σ_D is their quotient."""

    total: Float[Array, "d d"]
    comparisons: Float[Array, ""]


def empty_covariance(width: int) -> FeatureCovariance:
    """No comparisons of features of ``width`` numbers (2301.11270)."""
    return FeatureCovariance(jnp.zeros((width, width), jnp.float32), jnp.zeros((), jnp.float32))


@check_shapes
def add_comparisons(
    covariance: FeatureCovariance, differences: Float[Array, "n d"], mask: Bool[Array, " n"]
) -> FeatureCovariance:
    """Accumulates Σ_D = (1/n) Σ (φ_w − φ_l)(φ_w − φ_l)ᵀ (2301.11270, section 3).

    A ranking of K answers adds its C(K, 2) differences. The order and the cut into calls do not matter.
    """
    kept = jnp.where(mask[:, None], at_least_float32(differences), 0)
    return FeatureCovariance(
        covariance.total + jnp.matmul(kept.T, kept, precision="highest"), covariance.comparisons + jnp.sum(mask)
    )


@check_shapes
def pessimistic_rewards(
    rewards: Float[Array, " n"],
    features: Float[Array, "n d"],
    covariance: FeatureCovariance,
    *,
    bound: float,
    ridge: float,
    reference: Float[Array, " d"] | float = 0.0,
) -> Float[Array, " n"]:
    """``r − bound · ‖φ − ν‖`` in the norm of ``(Σ_D + λI)⁻¹`` (2301.11270, algorithm 1).

    A lower confidence bound where the data does not cover the features of a linear reward head: take the best of n by
    it. ``reference`` is ν, ``ridge`` λ > 0, ``bound`` of order sqrt((d + log 1/δ) / n).
    """
    if not ridge > 0:
        raise ValueError(f"pessimistic_rewards inverts Σ + ridge·I; give a ridge above 0, not {ridge}")
    sigma = covariance.total / jnp.maximum(covariance.comparisons, 1) + ridge * jnp.eye(covariance.total.shape[0])
    offsets = at_least_float32(features) - reference
    # ‖x‖² in the norm of (L Lᵀ)⁻¹ is |L⁻¹ x|².
    whitened = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(sigma), offsets.T, lower=True)
    return at_least_float32(rewards) - bound * jnp.linalg.norm(whitened, axis=0)


# --- Calibration ---


@check_shapes
def reward_bias(reference_rewards: Float[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, ""]:
    """What to add to a head's bias so that the references' mean reward is 0 (2403.17031, detail 15)."""
    return -masked_mean(reference_rewards, mask)
