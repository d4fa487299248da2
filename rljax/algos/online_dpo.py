"""Online DPO (2402.04792; asynchronous, 2410.18252): the best and the worst of a prompt's completions, DPO on the pair.

With two completions a prompt it is the paper's. A pair of equal scores says nothing and leaves the loss.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.algos.scores import ScoreConfig, scores_of
from rljax.losses.masked import masked_mean, masked_sum
from rljax.losses.preferences import PerPair, cdpo, dpo, hinge, ipo
from rljax.types import Experience, Outputs, PyTree, Term


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    beta: float  # strength of the KL to the reference that the loss implies
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"  # of a pair; ipo takes means per token
    label_smoothing: float = 0.0  # sigmoid: share of pairs that the scores order wrongly


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError for groups of one, which hold no pair."""
    if group_size == 1:
        raise ValueError("a pair is two completions of a prompt; set rollout.group_size to 2 or more")
    smoothed = partial(cdpo, label_smoothing=config.label_smoothing) if config.label_smoothing else dpo
    pairwise = partial({"sigmoid": smoothed, "ipo": ipo, "hinge": hinge}[config.loss], beta=config.beta)
    reduce = masked_mean if config.loss == "ipo" else masked_sum

    def targets(state: tuple, experience: Experience) -> tuple[tuple, Batch]:
        scores = scores_of(config, experience).reshape(-1, group_size)
        best, worst = jnp.argmax(scores, axis=1), jnp.argmin(scores, axis=1)
        return state, pair_batch(experience, jnp.stack([best, worst], axis=1), best != worst)

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        mask = batch["loss_mask"]
        new, ref = (pairs(reduce(x, mask, axis=-1)) for x in (full_logprobs(outputs), batch["ref_logprobs"]))
        losses = pairwise(new[:, 0], new[:, 1], ref[:, 0], ref[:, 1])
        return {"policy": Term(masked_sum(losses, whole_pairs(mask)), "pairs"), **margins(config.beta, new - ref, mask)}

    return Algorithm(
        needs=frozenset({"ref_logprobs"}),
        init=no_state,
        targets=targets,
        prepare=prepare_pairs,
        loss=loss,
        unit=2,
        rows_per_prompt=2,
    )


def pair_batch(experience: Experience, picks: Array, counts: Bool[Array, " p"]) -> Batch:
    """Rows 2i and 2i + 1: the two completions of prompt i that ``picks`` [p 2] names; a pair that does not count is
    masked."""
    rows: PyTree = jax.tree.map(
        lambda x: jax.vmap(lambda group, at: group[at])(x.reshape(len(picks), -1, *x.shape[1:]), picks).reshape(
            -1, *x.shape[1:]
        ),
        experience,
    )
    batch = {
        "tokens": rows.rollout.tokens,
        "valid": rows.rollout.valid,
        "loss_mask": rows.rollout.loss_mask & jnp.repeat(counts, 2)[:, None],
        "support": rows.rollout.support,
        "behavior_logprobs": rows.rollout.behavior_logprobs,
        "ref_logprobs": rows.ref_logprobs,
    }
    return jax.lax.stop_gradient(batch)


def prepare_pairs(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict[str, Float[Array, ""]]]:
    return state, batch, {"pairs": jnp.sum(whole_pairs(batch["loss_mask"])).astype(jnp.float32)}


def full_logprobs(outputs: Outputs) -> Float[Array, "b t"]:
    """Of the whole vocabulary, as the reference's are, also where sampling truncates."""
    assert outputs.logprobs is not None  # a policy is trained
    return outputs.logprobs if outputs.full_logprobs is None else outputs.full_logprobs


def pairs(x: Float[Array, " b"]) -> Float[Array, "p 2"]:
    return x.reshape(-1, 2)


def whole_pairs(mask: Bool[Array, "b t"]) -> Bool[Array, " p"]:
    """Pairs with a token on both sides: those that count."""
    return jnp.all(jnp.any(mask, axis=-1).reshape(-1, 2), axis=1)


def margins(beta: float, log_ratios: Float[Array, "p 2"], mask: Bool[Array, "b t"]) -> dict[str, Term]:
    """Metrics: the implicit reward of first minus second, and how often it is above 0."""
    margin: PerPair = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    kept = whole_pairs(mask)
    return {
        "margin": Term(masked_sum(margin, kept), "pairs", 0.0),
        "accuracy": Term(masked_sum((margin > 0).astype(jnp.float32), kept), "pairs", 0.0),
    }
