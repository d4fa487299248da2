"""SimPO (2405.14734): mean log-probs with a target margin, without a reference."""

from dataclasses import dataclass

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.algos.pairs import kept_pairs, means, pair_metrics, prepare_pairs
from rljax.losses.masked import masked_sum
from rljax.losses.reference_free import simpo
from rljax.types import Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config:
    beta: float  # scale of mean log-probs as implicit rewards
    gamma: float  # target margin; the paper's tables give gamma / beta


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.logprobs is not None
        mask = batch["loss_mask"]
        kept = kept_pairs(mask)
        chosen, rejected = means(outputs.logprobs, mask)
        losses = simpo(chosen, rejected, beta=config.beta, gamma=config.gamma)
        rewards = config.beta * chosen, config.beta * rejected
        metrics = pair_metrics(rewards, (chosen, rejected), kept)
        return {"preference": Term(masked_sum(losses, kept), "pairs"), **metrics}

    return Algorithm(frozenset(), no_state, targets=None, prepare=prepare_pairs, loss=loss, rows="pairs", unit=2)
