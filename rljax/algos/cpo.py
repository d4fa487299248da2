"""CPO (2401.08417): DPO with a uniform reference, plus behavior cloning of the chosen completion."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.algos.pairs import count_pairs, kept_pairs, pair_metrics, sides, sums
from rljax.losses.masked import count_tokens, masked_sum
from rljax.losses.reference_free import cpo
from rljax.types import Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config:
    beta: float  # scale of log-probs as implicit rewards
    nll_coef: float  # weight of the cloning term; 1 in the paper
    nll: Literal["sequence_sum", "token_mean"] = "sequence_sum"  # mean over pairs (eq. 3), or over tokens as in TRL


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    over = "pairs" if config.nll == "sequence_sum" else "chosen_tokens"

    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        mask = batch["loss_mask"]
        chosen = sides(mask)[0] & kept_pairs(mask)[:, None]
        return state, batch, {"pairs": count_pairs(mask), "chosen_tokens": count_tokens(chosen)}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.logprobs is not None
        mask = batch["loss_mask"]
        kept = kept_pairs(mask)
        chosen, rejected = sums(outputs.logprobs, mask)
        rewards = config.beta * chosen, config.beta * rejected
        return {
            "preference": Term(masked_sum(cpo(chosen, rejected, beta=config.beta, nll_coef=0.0), kept), "pairs"),
            "nll": Term(-masked_sum(chosen, kept), over, config.nll_coef),
            **pair_metrics(rewards, (chosen, rejected), kept),
        }

    return Algorithm(frozenset(), no_state, targets=None, prepare=prepare, loss=loss, rows="pairs", unit=2)
