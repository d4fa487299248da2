"""DPO (2305.18290) and its variants: other losses, log-probs, divergences and weights.

A reference that follows the policy (TR-DPO, 2404.09656) is the stage's: ``reference_ema``, ``reference_reset_steps``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.algos.pairs import Sides, kept_pairs, means, pair_metrics, prepare_pairs, sides
from rljax.losses.masked import masked_sum
from rljax.losses.preference_variants import (
    alpha_score,
    f_dpo,
    forward_kl_score,
    js_score,
    ld_logprobs,
    wpo_weights,
)
from rljax.losses.preferences import apo_down, apo_zero, cdpo, exo, hinge, ipo, nca, robust_dpo, sppo_hard
from rljax.types import Outputs, Term

Loss = Literal["sigmoid", "robust", "exo", "ipo", "ipo_sum", "hinge", "nca", "sppo_hard", "apo_zero", "apo_down"]

SMOOTHED: dict[str, Callable[..., Array]] = {"sigmoid": cdpo, "robust": robust_dpo, "exo": exo}
LOSSES: dict[str, Callable[..., Array]] = {
    "ipo": ipo,
    "ipo_sum": ipo,
    "hinge": hinge,
    "nca": nca,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    beta: float  # KL coefficient; 1/η in SPPO, τ in IPO
    loss: Loss = "sigmoid"  # ipo uses means per token, as in its paper's results; ipo_sum follows its equation
    label_smoothing: float = 0.0  # rate of wrong labels; read by sigmoid (cDPO), robust and exo
    average: bool = False  # use mean log-probs per token: length-normalised DPO (2411.15124)
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "reverse_kl"  # f-DPO (2309.16240)
    alpha: float = 0.5  # of the α-divergence; → 0 is the reverse KL, 1 the forward KL
    excess_weight: float = 1.0  # LD-DPO's α (2409.06411): weight of tokens beyond the length of the shorter side
    weights: Literal["none", "wpo", "wpo_capped"] = "none"  # WPO (2406.11827), capped at 1 as in its code


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError on options that the loss does not read."""
    _check(config)
    pairwise = _pairwise(config)

    def completions(logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Sides:
        if config.average or config.loss == "ipo":
            return means(logprobs, mask)
        (chosen, rejected), (w, l) = sides(logprobs), sides(mask)
        weigh = partial(ld_logprobs, alpha=config.excess_weight)  # the sum at 1
        return weigh(chosen, w, l), weigh(rejected, l, w)

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.logprobs is not None
        mask = batch["loss_mask"]
        kept = kept_pairs(mask)
        policy, reference = completions(outputs.logprobs, mask), completions(batch["ref_logprobs"], mask)
        losses = pairwise(*policy, *reference, beta=config.beta)
        if config.weights != "none":
            assert outputs.collision is not None  # it is in needs
            weights = wpo_weights(*sides(outputs.logprobs), *sides(outputs.collision), *sides(mask))
            losses *= weights if config.weights == "wpo" else jnp.minimum(weights, 1)
        chosen, rejected = (config.beta * (l - ref) for l, ref in zip(policy, reference, strict=True))
        return {"preference": Term(masked_sum(losses, kept), "pairs"), **pair_metrics((chosen, rejected), policy, kept)}

    needs = {"ref_logprobs"} | ({"collision"} if config.weights != "none" else set())
    return Algorithm(frozenset(needs), no_state, targets=None, prepare=prepare_pairs, loss=loss, rows="pairs", unit=2)


def _pairwise(config: Config) -> Callable[..., Array]:
    if config.divergence != "reverse_kl":
        scores = {"forward_kl": forward_kl_score, "jensen_shannon": js_score}
        return partial(f_dpo, score=scores.get(config.divergence, partial(alpha_score, alpha=config.alpha)))
    if config.loss in SMOOTHED:
        return partial(SMOOTHED[config.loss], label_smoothing=config.label_smoothing)
    return LOSSES[config.loss]


def _check(config: Config) -> None:
    smoothing = config.label_smoothing
    if config.loss not in SMOOTHED and smoothing:
        raise ValueError(f"loss {config.loss} reads no label_smoothing; {', '.join(SMOOTHED)} do")
    if config.loss == "exo" and not 0 < smoothing < 1:
        raise ValueError(f"exo is infinite at label_smoothing {smoothing}; give one inside (0, 1), such as 1e-3")
    if not 0 <= smoothing < 0.5 and config.loss != "exo":
        raise ValueError(f"label_smoothing {smoothing} is not a rate of wrong labels; give one in [0, 0.5)")
    if config.divergence != "reverse_kl" and (config.loss != "sigmoid" or smoothing):
        raise ValueError(f"divergence {config.divergence} replaces the loss; leave loss and label_smoothing out")
    if config.divergence == "alpha" and not config.alpha:
        raise ValueError("alpha 0 is the reverse KL; leave divergence out")
    if config.excess_weight != 1 and (config.average or config.loss == "ipo"):
        raise ValueError("excess_weight weighs sums over tokens, and this loss takes means; leave one out")
