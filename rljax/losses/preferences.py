"""Preference losses against a reference, one number a pair: DPO and the losses that replace its sigmoid.

``chosen_logprobs`` and the three beside it are log-probs of whole completions, summed over the kept tokens
(``sequence_logprobs``) or averaged (``masked_mean(..., axis=-1)``) where a docstring says so. r = log π − log π_ref of
one completion, w is the chosen and l the rejected one, Δ = r_w − r_l. Each function returns losses [b] to be minimised;
the caller drops pairs without ``valid_pairs``, sums, and divides by the pairs of the whole optimizer step, as
``dpo_loss`` does for one batch.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.logprobs import sequence_logprobs
from rljax.losses.masked import at_least_float32, masked_mean
from rljax.losses.shapes import check_shapes

PerPair = Float[Array, " b"]


def sequence_log_ratio(logprobs: PerPair, ref_logprobs: PerPair) -> PerPair:
    """r = log π − log π_ref; β·r is the implicit reward (2305.18290, section 4)."""
    return at_least_float32(logprobs) - at_least_float32(ref_logprobs)


def smoothed_sigmoid(logits: PerPair, label_smoothing: float) -> PerPair:
    """``−(1−ε) log σ(x) − ε log σ(−x)``: the cross-entropy of a pair whose label is wrong with probability ε."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


@check_shapes
def dpo(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    *,
    beta: float,
) -> PerPair:
    """DPO: ``−log σ(βΔ)`` (2305.18290, eq. 7); ln 2 where policy and reference agree."""
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


@check_shapes
def cdpo(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    *,
    beta: float,
    label_smoothing: float,
) -> PerPair:
    """cDPO: ``−(1−ε) log σ(βΔ) − ε log σ(−βΔ)`` (ericmitchell.ai/cdpo.pdf), ε the rate of wrong labels."""
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return smoothed_sigmoid(beta * (chosen - rejected), label_smoothing)


@check_shapes
def robust_dpo(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    *,
    beta: float,
    label_smoothing: float,
) -> PerPair:
    """Robust DPO: ``[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1−2ε)`` (2403.00409).

    Its mean over labels flipped with probability ε is DPO on the clean labels; one pair's loss may be negative.
    Raises ValueError unless 0 <= ε < 1/2.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"robust_dpo divides by 1 - 2ε; give label_smoothing in [0, 0.5), not {label_smoothing}")
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    logits = beta * (chosen - rejected)
    kept, flipped = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return (label_smoothing * flipped - (1 - label_smoothing) * kept) / (1 - 2 * label_smoothing)


@check_shapes
def ipo(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    *,
    beta: float,
) -> PerPair:
    """IPO: ``(Δ − 1/(2β))²``, β the paper's τ (2310.12036, eq. 17).

    The equation has summed log-probs; the paper's results, and TRL, use means per token. Pass either.
    """
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return jnp.square(chosen - rejected - 1 / (2 * beta))


@check_shapes
def hinge(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    *,
    beta: float,
) -> PerPair:
    """Hinge on the log-ratios: ``max(0, 1 − βΔ)`` (SLiC, 2305.10425, as normalised by RSO, 2309.06657)."""
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return jax.nn.relu(1 - beta * (chosen - rejected))


@check_shapes
def exo(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    *,
    beta: float,
    label_smoothing: float,
) -> PerPair:
    """EXO for pairs: ``KL((p, 1−p) ‖ (1−ε, ε))`` with p = σ(βΔ), the reverse of cDPO's KL (2402.00856, eq. 16).

    Smallest, 0, at p = 1−ε. Raises ValueError at ε = 0, where the loss is infinite; TRL then uses 1e-3.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(f"exo is infinite at label_smoothing={label_smoothing}; give one inside (0, 1), such as 1e-3")
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    logits = beta * (chosen - rejected)
    win = jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - math.log1p(-label_smoothing))
    lose = jax.nn.sigmoid(-logits) * (jax.nn.log_sigmoid(-logits) - math.log(label_smoothing))
    return win + lose


@check_shapes
def nca(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    *,
    beta: float,
) -> PerPair:
    """NCA for pairs: ``−log σ(βr_w) − ½ log σ(−βr_w) − ½ log σ(−βr_l)`` (2402.05369), absolute likelihoods."""
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    noise = jax.nn.log_sigmoid(-beta * chosen) + jax.nn.log_sigmoid(-beta * rejected)
    return -jax.nn.log_sigmoid(beta * chosen) - 0.5 * noise


@check_shapes
def sppo_hard(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    *,
    beta: float,
) -> PerPair:
    """SPPO, hard labels: ``(r_w − 1/(2β))² + (r_l + 1/(2β))²`` (2405.00675, eq. 4.7), 1/β the paper's η."""
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return jnp.square(chosen - 1 / (2 * beta)) + jnp.square(rejected + 1 / (2 * beta))


@check_shapes
def apo_zero(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    *,
    beta: float,
) -> PerPair:
    """APO-zero: ``1 − σ(βr_w) + σ(βr_l)``, for chosen answers better than the policy's (2408.06266, eq. 7)."""
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


@check_shapes
def apo_down(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    *,
    beta: float,
) -> PerPair:
    """APO-down: ``σ(βr_w) + 1 − σ(βΔ)``, for a policy better than the chosen answers (2408.06266, eq. 8)."""
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


@check_shapes
def valid_pairs(chosen_mask: Bool[Array, "b t"], rejected_mask: Bool[Array, "b s"]) -> Bool[Array, " b"]:
    """Pairs with at least one token on both sides: those that a mean over pairs counts."""
    return jnp.any(chosen_mask, axis=-1) & jnp.any(rejected_mask, axis=-1)


@check_shapes
def dpo_loss(
    chosen_logprobs: Float[Array, "b t"],
    rejected_logprobs: Float[Array, "b s"],
    ref_chosen_logprobs: Float[Array, "b t"],
    ref_rejected_logprobs: Float[Array, "b s"],
    chosen_mask: Bool[Array, "b t"],
    rejected_mask: Bool[Array, "b s"],
    *,
    beta: float,
    pairwise: Callable[..., PerPair] = dpo,
    average: bool = False,
) -> Float[Array, ""]:
    """DPO in one call, token log-probs to a scalar: the mean over pairs (2305.18290, eq. 7).

    ``pairwise`` is any loss of this module with DPO's four arrays, further arguments bound by ``functools.partial``.
    ``average`` divides each sum by its number of tokens (length-normalised DPO, 2411.15124; usual for ``ipo``).
    A pair with an empty side is not counted; no pair at all gives 0.
    """
    reduce = (lambda x, mask: masked_mean(x, mask, axis=-1)) if average else sequence_logprobs
    losses = pairwise(
        reduce(chosen_logprobs, chosen_mask),
        reduce(rejected_logprobs, rejected_mask),
        reduce(ref_chosen_logprobs, chosen_mask),
        reduce(ref_rejected_logprobs, rejected_mask),
        beta=beta,
    )
    return masked_mean(losses, valid_pairs(chosen_mask, rejected_mask))


def _log_ratios(chosen, rejected, ref_chosen, ref_rejected) -> tuple[PerPair, PerPair]:
    return sequence_log_ratio(chosen, ref_chosen), sequence_log_ratio(rejected, ref_rejected)
