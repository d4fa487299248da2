"""Preference losses without a reference model: SimPO, CPO, ORPO.

Per-pair losses [b] of log-probs of whole completions, to be minimised; l is a sum over the kept tokens, l̄ their mean.
The ``_loss`` forms take token log-probs and return the mean over pairs with a token on both sides, 0 without any.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.logprobs import sequence_logprobs
from rljax.losses.masked import at_least_float32, masked_mean
from rljax.losses.preferences import PerPair, valid_pairs
from rljax.losses.shapes import check_shapes


@check_shapes
def simpo(chosen_mean_logprobs: PerPair, rejected_mean_logprobs: PerPair, *, beta: float, gamma: float) -> PerPair:
    """SimPO: ``−log σ(β(l̄_w − l̄_l) − γ)`` (2405.14734, eq. 6); γ is the margin itself, not γ/β."""
    difference = at_least_float32(chosen_mean_logprobs) - at_least_float32(rejected_mean_logprobs)
    return -jax.nn.log_sigmoid(beta * difference - gamma)


@check_shapes
def cpo(chosen_logprobs: PerPair, rejected_logprobs: PerPair, *, beta: float, nll_coef: float = 1.0) -> PerPair:
    """CPO: ``−log σ(β(l_w − l_l)) − c·l_w``, DPO with a flat reference, plus cloning (2401.08417, eq. 3).

    ``nll_coef`` is c; 1 in the paper. TRL's second term is a mean over the batch's tokens instead.
    """
    chosen, rejected = at_least_float32(chosen_logprobs), at_least_float32(rejected_logprobs)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected)) - nll_coef * chosen


@check_shapes
def orpo(chosen_mean_logprobs: PerPair, rejected_mean_logprobs: PerPair, *, odds_coef: float) -> PerPair:
    """ORPO: ``−l̄_w − λ log σ(o_w − o_l)``, o = log q − log(1−q), q = e^{l̄} (2403.07691, eqs. 4, 6, 7).

    ``odds_coef`` is λ. l̄ is taken as at most −1e-6, where the odds are still finite.
    """
    chosen, rejected = at_least_float32(chosen_mean_logprobs), at_least_float32(rejected_mean_logprobs)
    return -chosen - odds_coef * jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logprobs: PerPair) -> PerPair:
    logprobs = jnp.minimum(logprobs, -1e-6)
    return logprobs - jnp.log(-jnp.expm1(logprobs))


@check_shapes
def simpo_loss(
    chosen_logprobs: Float[Array, "b t"],
    rejected_logprobs: Float[Array, "b s"],
    chosen_mask: Bool[Array, "b t"],
    rejected_mask: Bool[Array, "b s"],
    *,
    beta: float,
    gamma: float,
) -> Float[Array, ""]:
    """``simpo`` of token log-probs, mean over pairs (2405.14734, eq. 6)."""
    chosen = masked_mean(chosen_logprobs, chosen_mask, axis=-1)
    rejected = masked_mean(rejected_logprobs, rejected_mask, axis=-1)
    return masked_mean(simpo(chosen, rejected, beta=beta, gamma=gamma), valid_pairs(chosen_mask, rejected_mask))


@check_shapes
def cpo_loss(
    chosen_logprobs: Float[Array, "b t"],
    rejected_logprobs: Float[Array, "b s"],
    chosen_mask: Bool[Array, "b t"],
    rejected_mask: Bool[Array, "b s"],
    *,
    beta: float,
    nll_coef: float = 1.0,
) -> Float[Array, ""]:
    """``cpo`` of token log-probs, mean over pairs (2401.08417)."""
    chosen = sequence_logprobs(chosen_logprobs, chosen_mask)
    rejected = sequence_logprobs(rejected_logprobs, rejected_mask)
    return masked_mean(cpo(chosen, rejected, beta=beta, nll_coef=nll_coef), valid_pairs(chosen_mask, rejected_mask))


@check_shapes
def orpo_loss(
    chosen_logprobs: Float[Array, "b t"],
    rejected_logprobs: Float[Array, "b s"],
    chosen_mask: Bool[Array, "b t"],
    rejected_mask: Bool[Array, "b s"],
    *,
    odds_coef: float,
) -> Float[Array, ""]:
    """``orpo`` of token log-probs, mean over pairs (2403.07691, eq. 6)."""
    chosen = masked_mean(chosen_logprobs, chosen_mask, axis=-1)
    rejected = masked_mean(rejected_logprobs, rejected_mask, axis=-1)
    return masked_mean(orpo(chosen, rejected, odds_coef=odds_coef), valid_pairs(chosen_mask, rejected_mask))
