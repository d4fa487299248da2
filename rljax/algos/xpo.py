"""XPO (2405.21046): online DPO that also pushes down what the reference writes, and so explores.

A prompt's first completion is the policy's and its second the reference's (``rival_mixture`` 1); scores order the pair.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.algos.online_dpo import full_logprobs, margins, pair_batch, pairs, prepare_pairs, whole_pairs
from rljax.algos.scores import ScoreConfig, scores_of
from rljax.losses.masked import masked_sum
from rljax.losses.preferences import dpo
from rljax.types import Experience, Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    beta: float  # strength of the KL to the reference that the loss implies
    alpha: float  # of the exploration term, the log-prob of the reference's completion; 0 is online DPO


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError where a group is not one completion of each model."""
    if group_size != 2:
        raise ValueError("a pair is one completion of the policy and one of the reference; set rollout.group_size to 2")

    def targets(state: tuple, experience: Experience) -> tuple[tuple, Batch]:
        scores = scores_of(config, experience).reshape(-1, 2)
        won = scores[:, 0] > scores[:, 1]
        order = jnp.where(won[:, None], jnp.array([0, 1]), jnp.array([1, 0]))
        batch = pair_batch(experience, order, scores[:, 0] != scores[:, 1])
        del batch["behavior_logprobs"]  # the reference's, on half of the rows
        return state, {**batch, "from_reference": order.reshape(-1) == 1}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        mask = batch["loss_mask"]
        new, ref = (pairs(masked_sum(x, mask, axis=-1)) for x in (full_logprobs(outputs), batch["ref_logprobs"]))
        explore = jnp.sum(jnp.where(pairs(batch["from_reference"]), new, 0), axis=1)
        kept = whole_pairs(mask)
        losses = dpo(new[:, 0], new[:, 1], ref[:, 0], ref[:, 1], beta=config.beta)
        return {
            "policy": Term(masked_sum(losses, kept), "pairs"),
            "exploration": Term(masked_sum(explore, kept), "pairs", config.alpha),
            **margins(config.beta, new - ref, mask),
        }

    return Algorithm(
        needs=frozenset({"ref_logprobs"}),
        init=no_state,
        targets=targets,
        prepare=prepare_pairs,
        loss=loss,
        unit=2,
        rival_mixture=1.0,
    )
