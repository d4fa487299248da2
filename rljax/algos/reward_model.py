"""Reward models of whole answers: Bradley-Terry on pairs (2203.02155), Plackett-Luce on rankings (2301.11270)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.losses.masked import masked_sum
from rljax.losses.returns import is_last_token
from rljax.losses.reward_models import (
    bradley_terry,
    centering_penalty,
    pairwise_split,
    plackett_luce,
    rank_order,
    rankings,
)
from rljax.types import Outputs, Term

PerAnswer = Float[Array, "units k"]


@dataclass(frozen=True, kw_only=True)
class Config:
    loss: Literal["bradley_terry", "plackett_luce", "pairwise_split"]  # of pairs; of rankings; of their pairs
    answers: int = 2  # answers per row; rankings may have fewer
    margin_coef: float = 0.0  # margin as a multiple of a pair's score difference (2307.09288)
    centering_coef: float = 0.0  # weight of (r_w + r_l)², which keeps rewards near 0 (2312.09244)


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError on what a loss does not read."""
    pairs = config.loss == "bradley_terry"
    if pairs and config.answers != 2:
        raise ValueError(f"bradley_terry compares 2 answers, not {config.answers}; use plackett_luce or pairwise_split")
    if not pairs and (config.margin_coef or config.centering_coef):
        raise ValueError(f"{config.loss} reads no margin_coef and no centering_coef; bradley_terry does")
    ranked_loss = plackett_luce if config.loss == "plackett_luce" else pairwise_split

    def units(batch: Batch) -> tuple[PerAnswer, Bool[Array, "units k"]]:
        """Scores of a unit's answers, and which of them are there."""
        present = batch["answer_valid"] & jnp.any(batch["loss_mask"], axis=-1)
        return batch["scores"].reshape(-1, config.answers), present.reshape(-1, config.answers)

    def better(batch: Batch) -> Bool[Array, "units k k"]:
        """Where the first answer is preferred to the second: in a pair by place, in a ranking by score."""
        scores, present = units(batch)
        place = jnp.array([[False, True], [False, False]])
        return (place if pairs else scores[:, :, None] > scores[:, None, :]) & present[:, :, None] & present[:, None, :]

    def kept_units(batch: Batch) -> Bool[Array, " units"]:
        return rankings(units(batch)[1])

    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        counts = {"units": kept_units(batch), "comparisons": better(batch), "answers": units(batch)[1]}
        return state, batch, {name: jnp.sum(mask).astype(jnp.float32) for name, mask in counts.items()}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.scores is not None
        scores, present = units(batch)
        rewards = masked_sum(outputs.scores, is_last_token(batch["loss_mask"]), axis=-1).reshape(scores.shape)
        if pairs:
            chosen, rejected = rewards[:, 0], rewards[:, 1]
            losses = bradley_terry(chosen, rejected, config.margin_coef * (scores[:, 0] - scores[:, 1]))
            losses += config.centering_coef * centering_penalty(chosen, rejected)
        else:
            order = rank_order(scores, present)
            losses = ranked_loss(*(jnp.take_along_axis(x, order, axis=1) for x in (rewards, present)))
        terms = {"preference": Term(masked_sum(losses, kept_units(batch)), "units")}
        gaps, won = rewards[:, :, None] - rewards[:, None, :], better(batch)
        metrics = {
            "margin": gaps,
            "accuracy": (gaps > 0).astype(jnp.float32),
            "confidence": jax.nn.sigmoid(jnp.abs(gaps)),
        }
        terms |= {name: Term(masked_sum(value, won), "comparisons", 0.0) for name, value in metrics.items()}
        return terms | {"score": Term(masked_sum(rewards, present), "answers", 0.0)}

    return Algorithm(
        needs=frozenset(),
        init=no_state,
        targets=None,
        prepare=prepare,
        loss=loss,
        trains=("reward_model",),
        rows="pairs" if pairs else "ranked",
        unit=config.answers,
    )
