"""AOT (2406.05882): match sorted log-ratios of chosen and rejected completions over an optimizer step."""

from dataclasses import dataclass
from functools import partial

from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.algos.pairs import count_pairs, kept_pairs, on_rows, pair_metrics, sides, sums
from rljax.losses.masked import masked_sum
from rljax.losses.preference_variants import aot, aot_unpaired, match_ranks
from rljax.types import Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config:
    beta: float  # KL coefficient
    paired: bool  # compare sorted l_w - l_l with the reference's; otherwise sorted r_w with sorted r_l
    label_smoothing: float = 0.0  # rate of wrong labels


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    paired = partial(aot, beta=config.beta, label_smoothing=config.label_smoothing)
    unpaired = partial(aot_unpaired, beta=config.beta, label_smoothing=config.label_smoothing)

    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        """Ranks are of the whole step, as the policy was before it: each row carries its partner's number."""
        mask = batch["loss_mask"]
        kept = kept_pairs(mask)
        (w, l), (ref_w, ref_l) = sums(batch["current_logprobs"], mask), sums(batch["ref_logprobs"], mask)
        if config.paired:
            gap = match_ranks(w - l, ref_w - ref_l, kept)
            matched = on_rows(gap, gap)
        else:
            matched = on_rows(match_ranks(w - ref_w, l - ref_l, kept), match_ranks(l - ref_l, w - ref_w, kept))
        return state, {**batch, "matched": matched}, {"pairs": count_pairs(mask)}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.logprobs is not None
        mask, matched = batch["loss_mask"], sides(batch["matched"])
        kept = kept_pairs(mask)
        policy, reference = sums(outputs.logprobs, mask), sums(batch["ref_logprobs"], mask)
        chosen, rejected = policy[0] - reference[0], policy[1] - reference[1]
        losses = paired(*policy, matched[0]) if config.paired else unpaired(chosen, rejected, *matched)
        rewards = config.beta * chosen, config.beta * rejected
        return {"preference": Term(masked_sum(losses, kept), "pairs"), **pair_metrics(rewards, policy, kept)}

    needs = frozenset({"ref_logprobs", "current_logprobs"})
    return Algorithm(needs, no_state, targets=None, prepare=prepare, loss=loss, rows="pairs", unit=2)
