"""Nash-MD (2312.00886): the policy learns to be preferred over its own mixture with the reference.

A prompt's first completion is the policy's, its second a rival's from ``π^{1-m} ref^m`` (``rival_mixture``). Only the
first is trained; the rival leaves the batch once it has judged.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch, no_state, rollout_batch
from rljax.algos.online_dpo import whole_vocabulary
from rljax.algos.scores import ScoreConfig, scores_of
from rljax.losses.logprobs import sequence_logprobs
from rljax.losses.masked import count_sequences, masked_sum
from rljax.losses.preference_variants import nash_md, nash_md_per_token
from rljax.types import Experience, Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
    beta: float  # KL coefficient
    mixture: float  # m, the reference's share in the rival, 0 to 1 (.125 in the paper)
    preference: Literal["sigmoid", "order"] = "sigmoid"  # win probability: σ of the score gap, or 1, ½, 0
    per_token: bool = False  # each token is charged only for its own log-ratio, as in TRL


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError where a group is not one completion of each side."""
    if group_size != 2 or not 0 <= config.mixture <= 1:
        raise ValueError(
            "a group is a completion and its rival: set rollout.group_size to 2, and mixture within 0 to 1"
        )

    def targets(state: tuple, experience: Experience) -> tuple[tuple, Batch]:
        scores = scores_of(config, experience).reshape(-1, 2)
        gap = scores[:, 0] - scores[:, 1]
        chance = jax.nn.sigmoid(gap) if config.preference == "sigmoid" else (jnp.sign(gap) + 1) / 2
        assert experience.ref_logprobs is not None  # it is in needs
        batch = {
            **rollout_batch(jax.tree.map(lambda x: x[0::2], experience.rollout)),
            "ref_logprobs": experience.ref_logprobs[0::2],
            "preference": chance,
        }
        return state, jax.lax.stop_gradient(batch)

    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        return state, batch, {"sequences": count_sequences(batch["loss_mask"])}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        mask, new = batch["loss_mask"], whole_vocabulary(outputs).logprobs
        assert new is not None  # a policy is trained
        ref, chance, rows = batch["ref_logprobs"], batch["preference"], jnp.any(mask, axis=-1)
        if config.per_token:
            losses = nash_md_per_token(new, ref, chance, mask, beta=config.beta)
        else:
            losses = nash_md(sequence_logprobs(new, mask), sequence_logprobs(ref, mask), chance, beta=config.beta)
        return {
            "policy": Term(masked_sum(losses, rows), "sequences"),
            "win_chance": Term(masked_sum(chance, rows), "sequences", 0.0),
        }

    return Algorithm(
        needs=frozenset({"ref_logprobs"}),
        init=no_state,
        targets=targets,
        prepare=prepare,
        loss=loss,
        rows_per_prompt=1,
        rival_mixture=config.mixture,
    )
