"""ORPO (2403.07691): cross entropy on the chosen completion plus an odds ratio, without a reference."""

from dataclasses import dataclass

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.algos.pairs import kept_pairs, means, pair_metrics, prepare_pairs
from rljax.losses.masked import masked_sum
from rljax.losses.reference_free import orpo
from rljax.types import Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config:
    odds_coef: float  # λ, weight of the odds ratio beside the cross entropy


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.logprobs is not None
        mask = batch["loss_mask"]
        kept = kept_pairs(mask)
        chosen, rejected = means(outputs.logprobs, mask)
        losses = orpo(chosen, rejected, odds_coef=config.odds_coef)
        rewards = config.odds_coef * chosen, config.odds_coef * rejected
        return {
            "preference": Term(masked_sum(losses, kept), "pairs"),
            "nll": Term(-masked_sum(chosen, kept), "pairs", 0.0),
            **pair_metrics(rewards, (chosen, rejected), kept),
        }

    return Algorithm(frozenset(), no_state, targets=None, prepare=prepare_pairs, loss=loss, rows="pairs", unit=2)
