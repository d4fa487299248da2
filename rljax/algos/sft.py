"""Supervised fine-tuning: cross entropy on the tokens of the completion."""

from dataclasses import dataclass

from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.losses.masked import count_tokens, masked_sum
from rljax.types import Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tokens weigh alike, over the whole optimizer step."""


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        return state, batch, {"tokens": count_tokens(batch["loss_mask"])}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.logprobs is not None
        return {"nll": Term(-masked_sum(outputs.logprobs, batch["loss_mask"]), "tokens")}

    return Algorithm(needs=frozenset(), init=no_state, targets=None, prepare=prepare, loss=loss)
