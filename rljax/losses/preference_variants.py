"""What changes or joins a pairwise loss: f-divergences, transport, weights, moving references, online terms.

The notation is that of ``preferences``: r = log π − log π_ref of one completion, w chosen, l rejected.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.losses.logprobs import log_normalizer
from rljax.losses.masked import at_least_float32, masked_mean, zero_masked
from rljax.losses.preferences import PerPair, dpo, sequence_log_ratio, smoothed_sigmoid
from rljax.losses.shapes import Given, check_shapes, refuse_unequal

# --- f-divergences ---


@check_shapes
def f_dpo(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    *,
    beta: float,
    score: Callable[[PerPair], PerPair],
) -> PerPair:
    """f-DPO: ``−log σ(β(s(r_w) − s(r_l)))``, s(log u) = f'(u) of an f-divergence (2309.16240).

    ``forward_kl_score``, ``js_score``, ``partial(alpha_score, alpha=...)``; the identity (reverse KL) is DPO.
    """
    chosen = score(sequence_log_ratio(chosen_logprobs, ref_chosen_logprobs))
    rejected = score(sequence_log_ratio(rejected_logprobs, ref_rejected_logprobs))
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


@check_shapes
def forward_kl_score(log_ratios: PerPair) -> PerPair:
    """f' of the forward KL for ``f_dpo``: ``1 − e^{−r}``, r from −40 up (2309.16240)."""
    return -jnp.expm1(-jnp.maximum(log_ratios, -40.0))


@check_shapes
def js_score(log_ratios: PerPair) -> PerPair:
    """f' of the Jensen-Shannon divergence for ``f_dpo``: ``ln 2 + log σ(r)`` (2309.16240)."""
    return jax.nn.log_sigmoid(log_ratios) + math.log(2)


@check_shapes
def alpha_score(log_ratios: PerPair, *, alpha: float) -> PerPair:
    """f' of the α-divergence for ``f_dpo``: ``(1 − e^{−αr}) / α``, −αr up to 40 (2309.16240).

    α → 0 is the reverse KL (DPO), α = 1 the forward KL. Some codes write e^{(a−1)r} / (a−1): their a is 1 − α.
    """
    if alpha == 0:
        raise ValueError("alpha_score at alpha=0 is the reverse KL; use dpo")
    return -jnp.expm1(jnp.minimum(-alpha * log_ratios, 40.0)) / alpha


# --- Optimal transport: the k-th smallest against the k-th smallest of the whole optimizer step ---


@check_shapes
def match_ranks(values: PerPair, others: PerPair, mask: Bool[Array, " b"] | None = None) -> PerPair:
    """For each of ``values`` the one of ``others`` with the same rank, stop-gradient, for AOT (2406.05882).

    Call it on the whole optimizer step, before the cut into micro-batches. Masked rows take no part and get 0.
    """
    kept = jnp.ones(values.shape, bool) if mask is None else mask
    values, others = (jnp.where(kept, at_least_float32(x), jnp.inf) for x in (values, others))
    ranks = jnp.argsort(jnp.argsort(values))
    return jax.lax.stop_gradient(jnp.where(kept, jnp.sort(others)[ranks], 0))


@check_shapes
def aot(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    matched_ref_log_ratios: PerPair,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PerPair:
    """AOT, paired: cDPO on sorted ``l_w − l_l`` minus sorted ``ref l_w − ref l_l`` (2406.05882).

    ``matched_ref_log_ratios = match_ranks(chosen − rejected, ref_chosen − ref_rejected)``. The rows are in their own
    order; their sum and its gradient are those of the sorted lists.
    """
    log_ratios = at_least_float32(chosen_logprobs) - at_least_float32(rejected_logprobs)
    return smoothed_sigmoid(beta * (log_ratios - matched_ref_log_ratios), label_smoothing)


@check_shapes
def aot_unpaired(
    chosen_log_ratios: PerPair,
    rejected_log_ratios: PerPair,
    matched_rejected: PerPair,
    matched_chosen: PerPair,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PerPair:
    """AOT, unpaired: cDPO on sorted r_w minus sorted r_l (2406.05882).

    ``matched_rejected = match_ranks(r_w, r_l)``, ``matched_chosen = match_ranks(r_l, r_w)``. Each row carries the
    gradient of its own two log-ratios; the rows' sum and its gradient are those of the sorted lists.
    """
    from_chosen = smoothed_sigmoid(beta * (at_least_float32(chosen_log_ratios) - matched_rejected), label_smoothing)
    from_rejected = smoothed_sigmoid(beta * (matched_chosen - at_least_float32(rejected_log_ratios)), label_smoothing)
    both = from_chosen + from_rejected  # each sorted pair stands twice in the value, once in the gradient
    return both - jax.lax.stop_gradient(both / 2)


# --- Length and policy weights ---


@check_shapes
def ld_logprobs(
    logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"], other_mask: Bool[Array, "b s"], *, alpha: float
) -> PerPair:
    """LD-DPO: ``Σ_{t<=n} l_t + α Σ_{t>n} l_t``, n = min(|y_w|, |y_l|) kept tokens (2409.06411).

    ``other_mask`` is the other side of the pair. It replaces the sum for policy and reference alike; α = 1 is the sum.
    """
    shared = jnp.minimum(jnp.sum(mask, axis=-1), jnp.sum(other_mask, axis=-1))
    within = jnp.cumsum(mask, axis=-1) <= shared[:, None]
    return jnp.sum(jnp.where(within, 1.0, alpha) * zero_masked(mask, logprobs), axis=-1)


@check_shapes
def log_collision(logits: Float[Array, "*n v"], temperature: float = 1.0) -> Float[Array, "*n"]:
    """``log Σ_v π_v²``, the log of a sampled token's mean probability, for ``wpo_weights`` (2406.11827)."""
    logits = at_least_float32(logits) / temperature
    return log_normalizer(2 * logits) - 2 * log_normalizer(logits)


@check_shapes
def wpo_weights(
    chosen_logprobs: Float[Array, "b t"],
    rejected_logprobs: Float[Array, "b s"],
    chosen_log_collision: Float[Array, "b t"],
    rejected_log_collision: Float[Array, "b s"],
    chosen_mask: Bool[Array, "b t"],
    rejected_mask: Bool[Array, "b s"],
) -> PerPair:
    """WPO: ``w(y_w) w(y_l)``, w(y) = exp(mean_t [l_t − log Σ_v π_v²]), stop-gradient (2406.11827, eq. 2).

    Multiplies any pairwise loss; the log-collisions come from ``log_collision``. An empty side weighs 1. The authors'
    code also caps the product at 1: ``jnp.minimum(weights, 1)``.
    """
    chosen = masked_mean(chosen_logprobs - chosen_log_collision, chosen_mask, axis=-1)
    rejected = masked_mean(rejected_logprobs - rejected_log_collision, rejected_mask, axis=-1)
    return jax.lax.stop_gradient(jnp.exp(chosen + rejected))


# --- Moving references and online terms ---


def mix_reference(reference: Any, policy: Any, *, alpha: float) -> Any:
    """TR-DPO: ``π_ref ← α·π + (1−α)·π_ref``, leaf by leaf, every τ steps; α = 1 copies (2404.09656).

    In float32 or wider, back to each reference leaf's dtype; a reference in bfloat16 loses updates of a small α.
    """

    def mix(path, ref, new):
        leaf = jax.tree_util.keystr(path)
        leaves = [Given(f"{tree}{leaf}", ("*s",), x.shape) for tree, x in (("reference", ref), ("policy", new))]
        refuse_unequal("mix_reference", leaves)
        return (alpha * at_least_float32(new) + (1 - alpha) * at_least_float32(ref)).astype(ref.dtype)

    return jax.tree_util.tree_map_with_path(mix, reference, policy)


@check_shapes
def xpo(
    chosen_logprobs: PerPair,
    rejected_logprobs: PerPair,
    ref_chosen_logprobs: PerPair,
    ref_rejected_logprobs: PerPair,
    explore_logprobs: PerPair,
    *,
    beta: float,
    alpha: float,
) -> PerPair:
    """XPO: online DPO plus ``α·log π(ỹ)``, ỹ sampled from the reference (2405.21046, algorithm 1).

    ``explore_logprobs`` is the policy's log π(ỹ): pushing it down is the exploration bonus, so the loss has no minimum
    of its own. With one completion from the policy and one from the reference a pair, ỹ is the latter.
    """
    pairs = dpo(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta=beta)
    return pairs + alpha * at_least_float32(explore_logprobs)


@check_shapes
def nash_md(
    logprobs: Float[Array, " b"], ref_logprobs: Float[Array, " b"], preference: Float[Array, " b"], *, beta: float
) -> Float[Array, " b"]:
    """Nash-MD: ``−(p − ½ − β·sg(r))·l``, p the probability that y beats y' (2312.00886, Nash-MD-PG).

    y is the policy's and scored here; y' comes from the mixture π^{1−m}·π_ref^m. Log-probs are sums over the
    completion, so that β weighs the KL of whole sequences. The value has no meaning, the gradient has.
    """
    weight = preference - 0.5 - beta * sequence_log_ratio(logprobs, ref_logprobs)
    return -jax.lax.stop_gradient(weight) * at_least_float32(logprobs)


@check_shapes
def nash_md_per_token(
    logprobs: Float[Array, "b t"],
    ref_logprobs: Float[Array, "b t"],
    preference: Float[Array, " b"],
    mask: Bool[Array, "b t"],
    *,
    beta: float,
) -> Float[Array, " b"]:
    """Nash-MD as TRL has it: ``−(p − ½)·Σ_t l_t + β·Σ_t sg(l_t − ref_t)·l_t`` (2312.00886).

    Each token answers for its own log-ratio only, which leaves out its effect on the KL of later tokens. An empty row
    gives 0.
    """
    logprobs, ref_logprobs = zero_masked(mask, logprobs, ref_logprobs)
    weight = preference[:, None] - 0.5 - beta * (logprobs - ref_logprobs)
    return -jnp.sum(jax.lax.stop_gradient(weight) * logprobs, axis=-1)
