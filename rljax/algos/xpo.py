"""XPO (2405.21046): online DPO that also lowers the likelihood of the reference's completions, to explore.

A prompt's first completion is the policy's and its second the reference's (``rival_mixture`` 1); scores order the pair.
Equal scores leave the preference's mean, not the exploration's. In one call: ``losses.xpo``.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.algos.online_dpo import pair_batch, whole_vocabulary
from rljax.algos.pairs import kept_pairs, pair_metrics, sides, sums
from rljax.algos.scores import ScoreConfig, scores_of
from rljax.losses.masked import masked_sum
from rljax.losses.preferences import dpo
from rljax.types import Experience, Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    beta: float  # KL coefficient
    alpha: float  # weight of the exploration term, the log-prob of the reference's completion; 0 is online DPO


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError where a group is not one completion of each model."""
    if group_size != 2:
        raise ValueError("a pair is one completion of the policy and one of the reference; set rollout.group_size to 2")

    def targets(state: tuple, experience: Experience) -> tuple[tuple, Batch]:
        policys, references = sides(scores_of(config, experience))
        won, ordered = policys > references, policys != references
        order = jnp.stack([~won, won], axis=1).astype(jnp.int32)  # 1 is the reference's completion
        batch = pair_batch(experience, order, jnp.ones_like(ordered))  # a tie explores, though it prefers nothing
        del batch["behavior_logprobs"]  # on half of the rows those of the reference
        return state, {**batch, "from_reference": order.reshape(-1) == 1, "ordered": jnp.repeat(ordered, 2)}

    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        pairs = kept_pairs(batch["loss_mask"])
        counts = {"pairs": pairs & sides(batch["ordered"])[0], "explored": pairs}
        return state, batch, {name: jnp.sum(kept).astype(jnp.float32) for name, kept in counts.items()}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        mask, logprobs = batch["loss_mask"], whole_vocabulary(outputs).logprobs
        assert logprobs is not None  # a policy is trained
        explored = kept_pairs(mask)
        kept = explored & sides(batch["ordered"])[0]
        policy, reference = sums(logprobs, mask), sums(batch["ref_logprobs"], mask)
        explore: Array = jnp.where(sides(batch["from_reference"])[0], *policy)
        losses = dpo(*policy, *reference, beta=config.beta)
        chosen, rejected = (config.beta * (l - ref) for l, ref in zip(policy, reference, strict=True))
        return {
            "preference": Term(masked_sum(losses, kept), "pairs"),
            "exploration": Term(masked_sum(explore, explored), "explored", config.alpha),
            **pair_metrics((chosen, rejected), policy, kept),
        }

    return Algorithm(
        needs=frozenset({"ref_logprobs"}),
        init=no_state,
        targets=targets,
        prepare=prepare,
        loss=loss,
        unit=2,
        rival_mixture=1.0,
    )
