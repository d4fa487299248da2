"""Losses on single completions marked desirable or not: KTO and BCO.

Per-row losses [b], to be minimised. What they need from other rows, KTO's reference point and BCO's shift, is an
argument, made once per optimizer step over the global batch by a function of its own. r = log π − log π_ref of one row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.logprobs import sequence_logprobs
from rljax.losses.masked import masked_mean
from rljax.losses.preferences import sequence_log_ratio
from rljax.losses.shapes import check_shapes

PerRow = Float[Array, " b"]
OneOrPerRow = Float[Array, ""] | PerRow  # one number for all rows, as it is or repeated in each


@check_shapes
def kto_reference_point(
    mismatched_logprobs: PerRow, mismatched_ref_logprobs: PerRow, mask: Bool[Array, " b"] | None = None
) -> Float[Array, ""]:
    """KTO's z0: ``max(0, mean_i r(x_i, y_{i+1}))``, stop-gradient (2402.01306, section 4).

    Log-probs of completions under *another* row's prompt, an estimate of KL(π‖π_ref). Rows outside ``mask`` do not
    count; an empty mask gives 0.
    """
    ratios = sequence_log_ratio(mismatched_logprobs, mismatched_ref_logprobs)
    mask = jnp.ones(ratios.shape, bool) if mask is None else mask
    return jax.lax.stop_gradient(jnp.maximum(masked_mean(ratios, mask), 0))


@check_shapes
def kto(
    logprobs: PerRow,
    ref_logprobs: PerRow,
    desirable: Bool[Array, " b"],
    reference_point: OneOrPerRow,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PerRow:
    """KTO: ``λ_D (1 − σ(β(r − z0)))`` if desirable, ``λ_U (1 − σ(β(z0 − r)))`` if not (2402.01306, eq. 7).

    ``reference_point`` is z0. λ_D·n_D / (λ_U·n_U) in [1, 4/3] is the paper's advice for unequal counts.
    """
    margin = beta * (sequence_log_ratio(logprobs, ref_logprobs) - reference_point)
    return jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-margin), undesirable_weight * jax.nn.sigmoid(margin))


@check_shapes
def bco(
    logprobs: PerRow, ref_logprobs: PerRow, desirable: Bool[Array, " b"], shift: OneOrPerRow, *, beta: float
) -> PerRow:
    """BCO: ``−log σ(βr − δ)`` if desirable, ``−log σ(−(βr − δ))`` if not (2404.04656).

    ``shift`` is δ, the running mean of βr over good and bad rows: keep ``RunningMoments`` in the checkpoint and pass
    ``merge_moments(state, moments_of(β·r, mask)).mean``, once per optimizer step over the global batch.
    """
    logits = beta * sequence_log_ratio(logprobs, ref_logprobs) - shift
    return -jax.nn.log_sigmoid(jnp.where(desirable, logits, -logits))


@check_shapes
def kto_loss(
    logprobs: Float[Array, "b t"],
    ref_logprobs: Float[Array, "b t"],
    loss_mask: Bool[Array, "b t"],
    desirable: Bool[Array, " b"],
    reference_point: Float[Array, ""],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, ""]:
    """``kto`` of token log-probs, mean over rows that keep a token, 0 without any (2402.01306, eq. 7)."""
    losses = kto(
        sequence_logprobs(logprobs, loss_mask),
        sequence_logprobs(ref_logprobs, loss_mask),
        desirable,
        reference_point,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    return masked_mean(losses, jnp.any(loss_mask, axis=-1))


@check_shapes
def bco_loss(
    logprobs: Float[Array, "b t"],
    ref_logprobs: Float[Array, "b t"],
    loss_mask: Bool[Array, "b t"],
    desirable: Bool[Array, " b"],
    shift: Float[Array, ""],
    *,
    beta: float,
) -> Float[Array, ""]:
    """``bco`` of token log-probs, mean over rows that keep a token, 0 without any (2404.04656)."""
    policy, reference = sequence_logprobs(logprobs, loss_mask), sequence_logprobs(ref_logprobs, loss_mask)
    return masked_mean(bco(policy, reference, desirable, shift, beta=beta), jnp.any(loss_mask, axis=-1))
