"""PPO-max (2307.04964): PPO on rewards normalised by running statistics, and clipped.

The rest of its set are settings: kl_coef .05 in the reward, value_clip .2, a critic from the reward model
(``critic.init_from``), first trained alone (``optim.freeze_steps``), ``text_mix`` for PPO-ptx.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.algos import ppo
from rljax.algos.base import Algorithm, Batch
from rljax.losses.advantages import RunningMoments, empty_moments, merge_moments, moments_of, running_std
from rljax.types import Experience


@dataclass(frozen=True, kw_only=True)
class Config(ppo.Config):
    reward_center: bool = True  # subtract the running mean; the authors' script only divides
    normalized_clip: float | None  # clip normalised rewards to ± this (10 in the authors' code); None: no clip


class State(NamedTuple):
    rewards: RunningMoments
    ppo: ppo.State


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError where PPO does."""
    plain = ppo.make(config, group_size=group_size, max_new_tokens=max_new_tokens)
    plain_targets = plain.targets
    assert plain_targets is not None  # PPO is online

    def init() -> State:
        return State(empty_moments(), plain.init())

    def normalized(moments: RunningMoments, rewards: Float[Array, " b"]) -> Float[Array, " b"]:
        centred = rewards - moments.mean if config.reward_center else rewards
        scaled = centred / (running_std(moments) + 1e-8)
        return (
            scaled
            if config.normalized_clip is None
            else jnp.clip(scaled, -config.normalized_clip, config.normalized_clip)
        )

    def targets(state: State, experience: Experience) -> tuple[State, Batch]:
        rows = jnp.any(experience.rollout.loss_mask, axis=-1)
        moments = merge_moments(state.rewards, moments_of(experience.rewards, rows))
        rewards = normalized(moments, experience.rewards)
        inner, batch = plain_targets(state.ppo, experience._replace(rewards=rewards))
        return State(moments, inner), batch

    def prepare(state: State, batch: Batch, key: Array) -> tuple[State, Batch, dict]:
        inner, batch, denominators = plain.prepare(state.ppo, batch, key)
        return State(state.rewards, inner), batch, denominators

    return plain._replace(init=init, targets=targets, prepare=prepare)
