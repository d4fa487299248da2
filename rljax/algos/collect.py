"""Sampling without training: a stage whose completions become the data of a later stage."""

from dataclasses import dataclass

from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.types import Experience, Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config:
    """What becomes of the samples, the stage that reads them says (``select``)."""


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """``trains`` is empty: no update is made, and nothing but the stage's start is read."""

    def targets(state: tuple, experience: Experience) -> tuple[tuple, Batch]:
        rollout = experience.rollout
        return state, {"tokens": rollout.tokens, "valid": rollout.valid, "loss_mask": rollout.loss_mask}

    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        return state, batch, {}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        return {}

    return Algorithm(frozenset(), no_state, targets, prepare, loss, trains=())
