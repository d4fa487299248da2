"""Reward models of prefixes: predict the outcome at every token, or the correctness of a step at its end.

Which of the two is in the rows: an outcome labels every token of the completion (ORM, 2110.14168, 2403.04642), steps
label their last tokens (PRM, 2305.20050). The score is the logit of the probability.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.losses.masked import count_tokens, masked_sum
from rljax.losses.reward_models import binary_cross_entropy
from rljax.types import Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config:
    """Labels weigh alike, over the whole optimizer step."""


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        return state, batch, {"labels": count_tokens(batch["label_mask"])}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.scores is not None
        mask, labels, logits = batch["label_mask"], batch["labels"], outputs.scores
        values = {
            "accuracy": ((logits > 0) == (labels > 0.5)).astype(jnp.float32),
            "confidence": jax.nn.sigmoid(jnp.abs(logits)),
            "probability": jax.nn.sigmoid(logits),
            "label": labels,
        }
        metrics = {name: Term(masked_sum(value, mask), "labels", 0.0) for name, value in values.items()}
        losses = binary_cross_entropy(logits, labels, mask)
        return {"classification": Term(masked_sum(losses, mask), "labels"), **metrics}

    return Algorithm(
        needs=frozenset(),
        init=no_state,
        targets=None,
        prepare=prepare,
        loss=loss,
        trains=("reward_model",),
        rows="steps",
    )
