"""Processing of raw scores: missing end token, gain and bias, clipping."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.types import FINISH_END, Experience


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What is done to scores before anything else."""

    missing_end: Literal["keep", "replace", "subtract"] = "keep"  # effect of a missing end token on the score
    missing_end_value: float = 0.0  # replace: the score used instead (-10, -1); subtract: the amount (1)
    reward_gain: float = 1.0  # multiplies the score
    reward_bias: float = 0.0  # added to the score after the gain
    reward_clip: float | None = None  # clip the score to ± this


def is_finished(experience: Experience) -> Bool[Array, " b"]:
    return experience.rollout.finish_reason == FINISH_END


def scores_of(config: ScoreConfig, experience: Experience) -> Float[Array, " b"]:
    """``clip(gain · score + bias)``, the end token's rule before it (EasyLM, 2406.09279; detail 23 of 2403.17031)."""
    scores, finished = experience.rewards, is_finished(experience)
    if config.missing_end == "replace":
        scores = jnp.where(finished, scores, config.missing_end_value)
    if config.missing_end == "subtract":
        scores = jnp.where(finished, scores, scores - config.missing_end_value)
    return clip_to(config.reward_gain * scores + config.reward_bias, config.reward_clip)


def clip_to(x: Float[Array, "*s"], bound: float | None) -> Float[Array, "*s"]:
    """Within ± ``bound``; None is no bound."""
    return x if bound is None else jnp.clip(x, -bound, bound)
