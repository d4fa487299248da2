"""The policy in online algorithms: surrogates, off-policy weights, KL and entropy, each chosen by name.

Three policies, three names: the sampler's log-probs are ``behavior_logprobs``; ``proximal_logprobs`` are the trainer's
own, once before the first update, where a correction asks for them; ratios are current over proximal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from rljax.algos.base import Algorithm, Batch, no_state, rollout_batch
from rljax.algos.scores import ScoreConfig, is_finished
from rljax.losses.corrections import (
    geometric_importance_weights,
    icepop,
    importance_weights,
    masked_importance,
    sequence_importance_weights,
    truncated_importance,
)
from rljax.losses.kl import k1, k2, k3, k4, straight_through
from rljax.losses.masked import (
    AGGREGATIONS,
    Aggregation,
    constant_length,
    count_all_sequences,
    count_tokens,
    masked_mean,
    masked_sum,
    zero_masked,
)
from rljax.losses.policy import (
    cispo,
    clip_cov,
    clipped_surrogate,
    dual_clip,
    gmpo,
    gspo,
    gspo_token,
    highest_covariance,
    is_clipped_high,
    is_clipped_low,
    kl_cov,
    logprob_covariance,
    random_high_covariance,
    reinforce,
    sapo,
)
from rljax.types import Experience, Outputs, Term

AggregationName = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"]
PerToken = Float[Array, "b t"]
Mask = Bool[Array, "b t"]


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What the losses of online policies share."""

    kl_coef: float  # coefficient of the KL to the reference; 0: no reference is loaded
    clip_low: float  # clip the ratio below 1 - clip_low (gmpo: its logarithm below -clip_low)
    clip_high: float  # clip the ratio above 1 + clip_high (gmpo: its logarithm above clip_high)
    aggregation: AggregationName  # how token losses are averaged
    kl_in: Literal["loss", "reward"] = "loss"  # apply the KL penalty in the loss or in the reward
    kl_estimator: Literal["k1", "k2", "k3", "k4", "straight_through"] = (
        "k3"  # use k1 in the reward, any other in the loss
    )
    kl_of_truncated: bool = False  # allow the KL in the reward although top-k/top-p truncate only the sampler
    surrogate: Literal["clipped", "gspo", "gspo_token", "cispo", "gmpo", "sapo", "reinforce"] = (
        "clipped"  # token loss; gspo and gmpo use one ratio per sequence, reinforce none
    )
    dual_clip: float | None = None  # bound on the loss at negative advantages (1912.09729), usually 3
    sapo_tau: tuple[float, ...] = (1.0, 1.05)  # sapo's temperatures for positive and negative advantages
    entropy_coef: float = 0.0  # weight of the entropy bonus
    count_empty: bool = False  # means over sequences divide by all of them, also by those left out of the loss (TRL)
    mask_truncated: bool = False  # leave truncated completions out of the loss; statistics keep them
    correction: Literal["none", "decoupled", "truncated", "masked", "two_sided"] = (
        "none"  # off-policy weight, proximal over behavior: as is (2110.00641), TIS, MIS, IcePop
    )
    correction_of: Literal["token", "sequence", "geometric"] = "token"  # level at which that weight is computed
    correction_low: float = 0.0  # two_sided: smaller weights become 0
    correction_high: float = 2.0  # truncated: largest weight; masked and two_sided: larger weights become 0
    covariance: Literal["none", "clip_cov", "kl_cov"] = "none"  # against entropy collapse (2505.22617)
    covariance_share: float = 2e-4  # fraction of tokens selected
    covariance_bounds: tuple[float, ...] = (1.0, 5.0)  # clip_cov selects among tokens with a covariance between these
    covariance_kl_coef: float = 1.0  # kl_cov: weight of |log ratio| at the selected tokens


@dataclass(frozen=True, kw_only=True)
class ShapedRewardConfig(PolicyConfig, ScoreConfig):
    """What algorithms share that charge the KL in the reward and read a score's rules."""

    kl_in: Literal["loss", "reward"] = "reward"  # apply the KL penalty in the loss or in the reward
    kl_estimator: Literal["k1", "k2", "k3", "k4", "straight_through"] = (
        "k1"  # use k1 in the reward, any other in the loss
    )


SURROGATES: dict[str, Callable[[PolicyConfig, PerToken, PerToken, PerToken, Mask], PerToken]] = {
    "clipped": lambda c, new, old, a, mask: clipped_surrogate(new, old, a, c.clip_low, c.clip_high),
    "gspo": lambda c, new, old, a, mask: gspo(new, old, a, mask, c.clip_low, c.clip_high),
    "gspo_token": lambda c, new, old, a, mask: gspo_token(new, old, a, mask, c.clip_low, c.clip_high),
    "cispo": lambda c, new, old, a, mask: cispo(new, old, a, c.clip_low, c.clip_high),
    "gmpo": lambda c, new, old, a, mask: gmpo(new, old, a, mask, c.clip_low, c.clip_high),
    "sapo": lambda c, new, old, a, mask: sapo(new, old, a, *c.sapo_tau),
    "reinforce": lambda c, new, old, a, mask: reinforce(new, a),
}
OF_SEQUENCES = ("gspo", "gmpo")
WITHOUT_RATIO = ("cispo", "reinforce")  # their loss is -A log π, with or without a constant weight
KL_ESTIMATORS: dict[str, Callable[[PerToken, PerToken, PerToken], PerToken]] = {
    "k1": lambda new, ref, sampled: k1(new, ref),
    "k2": lambda new, ref, sampled: k2(new, ref),
    "k3": lambda new, ref, sampled: k3(new, ref),
    "k4": lambda new, ref, sampled: k4(new, ref, sampled),
    "straight_through": lambda new, ref, sampled: straight_through(new, ref),
}
WEIGHTS = {
    "token": importance_weights,
    "sequence": sequence_importance_weights,
    "geometric": geometric_importance_weights,
}
CORRECTIONS: dict[str, Callable[[PolicyConfig, PerToken], PerToken]] = {
    "decoupled": lambda c, w: w,
    "truncated": lambda c, w: truncated_importance(w, c.correction_high),
    "masked": lambda c, w: masked_importance(w, c.correction_high),
    "two_sided": lambda c, w: icepop(w, c.correction_low, c.correction_high),
}


def policy_algorithm(
    config: PolicyConfig,
    max_new_tokens: int,
    targets: Callable[[Any, Experience], tuple[Any, Batch]],
    init: Callable[[], Any] = no_state,
) -> Algorithm:
    """An algorithm that is its ``targets``: the loss is ``policy_terms``. Raises ValueError as ``policy_needs``."""
    aggregation = aggregation_of(config, max_new_tokens)

    def prepare(state: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Any, Batch, dict]:
        return state, *policy_prepare(config, aggregation, batch, key)

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        return policy_terms(config, aggregation, outputs, batch)

    return Algorithm(frozenset(policy_needs(config)), init, targets, prepare, loss)


def policy_needs(config: PolicyConfig) -> set[str]:
    """What the trainer has to compute for these settings. Raises ValueError for settings that contradict each other."""
    if config.surrogate in OF_SEQUENCES and config.aggregation != "sequence_mean_token_mean":
        raise ValueError(
            f"surrogate {config.surrogate!r} is of whole sequences; set aggregation to 'sequence_mean_token_mean'"
        )
    if config.count_empty and not config.aggregation.startswith("sequence_mean"):
        raise ValueError(
            f"count_empty is of means over sequences, and aggregation is {config.aggregation!r}; turn it off"
        )
    if config.kl_coef and config.kl_in == "loss" and config.kl_estimator == "k1":
        raise ValueError("kl_estimator 'k1' has no gradient in the loss; set kl_in to 'reward', or take k2 or k3")
    if config.dual_clip is not None and config.surrogate in WITHOUT_RATIO:
        raise ValueError(
            f"dual_clip bounds a ratio, and surrogate {config.surrogate!r} has none in its loss; leave it out"
        )
    if config.dual_clip is not None and not config.dual_clip > 1:
        raise ValueError(f"dual_clip is {config.dual_clip:g}; it bounds the ratio and must be above 1 (usually 3)")
    if len(config.sapo_tau) != 2 or len(config.covariance_bounds) != 2:
        raise ValueError("sapo_tau and covariance_bounds are two numbers each")
    asked = {
        "entropy": True,
        "ref_logprobs": config.kl_coef != 0,
        "proximal_logprobs": config.correction != "none",
        "current_logprobs": config.covariance != "none",
    }
    return {name for name, needed in asked.items() if needed}


def aggregation_of(config: PolicyConfig, max_new_tokens: int) -> Aggregation:
    if config.aggregation == "constant_length":
        return constant_length(max_new_tokens)
    chosen = AGGREGATIONS[config.aggregation]
    assert isinstance(chosen, Aggregation)
    return chosen._replace(denominator=count_all_sequences) if config.count_empty else chosen


def trained_mask(config: PolicyConfig, experience: Experience) -> Mask:
    """The tokens of the loss: those that were sampled, without truncated rows where these are masked."""
    mask = experience.rollout.loss_mask
    return mask & is_finished(experience)[:, None] if config.mask_truncated else mask


def kl_in_reward(config: PolicyConfig, experience: Experience) -> PerToken:
    """KL of the sampler to the reference at each token, on its own samples; 0 where the reward is not charged."""
    mask, sampled = experience.rollout.loss_mask, experience.rollout.behavior_logprobs
    if not config.kl_coef or config.kl_in == "loss":
        return jnp.zeros_like(sampled)
    assert experience.ref_logprobs is not None  # it is in needs
    sampled, ref = zero_masked(mask, sampled, experience.ref_logprobs)
    return KL_ESTIMATORS[config.kl_estimator](sampled, ref, sampled)


def policy_batch(config: PolicyConfig, experience: Experience, advantages: PerToken) -> Batch:
    """The columns that ``policy_terms`` reads. Advantages are per token."""
    rollout = experience.rollout
    batch = rollout_batch(rollout) | {"loss_mask": trained_mask(config, experience), "advantages": advantages}
    if config.kl_coef and config.kl_in == "loss":
        assert experience.ref_logprobs is not None  # it is in needs
        batch["ref_logprobs"] = experience.ref_logprobs
    if config.correction != "none":
        assert experience.proximal_logprobs is not None  # it is in needs
        batch["proximal_logprobs"] = experience.proximal_logprobs
        weights = WEIGHTS[config.correction_of](
            experience.proximal_logprobs, rollout.behavior_logprobs, rollout.loss_mask
        )
        batch["weights"] = CORRECTIONS[config.correction](config, weights)
    return jax.lax.stop_gradient(batch)


def policy_prepare(
    config: PolicyConfig, aggregation: Aggregation, batch: Batch, key: PRNGKeyArray
) -> tuple[Batch, dict[str, Float[Array, ""]]]:
    """The minibatch with its covariance masks, and the denominator that ``policy_terms`` names."""
    mask = batch["loss_mask"]
    if config.covariance != "none":
        current, advantages = batch["current_logprobs"], batch["advantages"]
        covariance = logprob_covariance(advantages, current, mask)
        count = config.covariance_share * count_tokens(mask)
        if config.covariance == "kl_cov":
            selected = highest_covariance(covariance, mask, count=count)
        else:
            new, old, known = zero_masked(mask, current, _old(batch), advantages)
            clipped = _clipped(config, new, old, known, mask)
            low, high = config.covariance_bounds
            selected = random_high_covariance(
                key, covariance, mask & ~clipped[0] & ~clipped[1], count=count, low=low, high=high
            )
        batch = {**batch, "selected": selected}
    return batch, {"aggregated": aggregation.denominator(mask)}


def policy_terms(config: PolicyConfig, aggregation: Aggregation, outputs: Outputs, batch: Batch) -> dict[str, Term]:
    assert outputs.logprobs is not None and outputs.entropy is not None  # it is in needs
    mask = batch["loss_mask"]
    new, entropy, old, advantages = zero_masked(
        mask, outputs.logprobs, outputs.entropy, _old(batch), batch["advantages"]
    )
    losses = SURROGATES[config.surrogate](config, new, old, advantages, mask)
    if config.dual_clip is not None:
        losses = dual_clip(losses, advantages, config.dual_clip)
    if config.correction != "none":
        losses = batch["weights"] * losses
    if config.covariance == "clip_cov":
        losses = clip_cov(losses, batch["selected"])
    if config.covariance == "kl_cov":
        losses = kl_cov(losses, new, old, batch["selected"], config.covariance_kl_coef)
    terms = {
        "policy": Term(aggregation.numerator(losses, mask), "aggregated"),
        "entropy": Term(masked_sum(entropy, mask), "tokens", 0.0),
    }
    if config.surrogate in ("clipped", "gspo", "gspo_token"):
        low, high = _clipped(config, new, old, advantages, mask)
        terms["clip_fraction_low"] = Term(count_tokens(low), "tokens", 0.0)
        terms["clip_fraction_high"] = Term(count_tokens(high), "tokens", 0.0)
    if config.correction != "none":
        terms["correction_weight"] = Term(masked_sum(batch["weights"], mask), "tokens", 0.0)
    if config.entropy_coef:
        terms["entropy_bonus"] = Term(aggregation.numerator(entropy, mask), "aggregated", -config.entropy_coef)
    if config.kl_coef and config.kl_in == "loss":
        # Between the whole distributions, also where sampling truncates: the ratio alone is on the support.
        full = outputs.logprobs if outputs.full_logprobs is None else outputs.full_logprobs
        sampled = batch["behavior_logprobs"]
        kl = KL_ESTIMATORS[config.kl_estimator](*zero_masked(mask, full, batch["ref_logprobs"], sampled))
        terms["kl"] = Term(aggregation.numerator(kl, mask), "aggregated", config.kl_coef)
    return terms


def _old(batch: Batch) -> PerToken:
    return batch.get("proximal_logprobs", batch["behavior_logprobs"])


def _clipped(config: PolicyConfig, new: PerToken, old: PerToken, advantages: PerToken, mask: Mask) -> tuple[Mask, Mask]:
    """Tokens that lost their gradient at the lower and at the upper edge; gspo's edges see a sequence's mean ratio."""
    if config.surrogate in ("cispo", "sapo", "reinforce"):  # no token of theirs is clipped
        return jnp.zeros_like(mask), jnp.zeros_like(mask)
    below, above = config.clip_low, config.clip_high
    if config.surrogate == "gmpo":  # its edges are the log ratio's
        below, above = 1 - math.exp(-below), math.exp(above) - 1
    if config.surrogate.startswith("gspo"):
        new = old + masked_mean(new - old, mask, axis=-1)[:, None]
    low = mask & is_clipped_low(new, old, advantages, below)
    return low, mask & is_clipped_high(new, old, advantages, above)
