"""REINFORCE (Williams 1992) with a baseline and token rewards: REINFORCE++ (2501.03262) and ReMax (2310.10505).

REINFORCE++: baseline none, whiten_advantages, kl_in reward, the clipped surrogate; its baseline form: baseline group.
ReMax: baseline greedy: a prompt's first completion is decoded greedily, serves as the baseline and leaves the batch.
"""

from dataclasses import dataclass
from typing import Literal

import jax
from jaxtyping import Array, Float

from rljax.algos.base import Algorithm, Batch
from rljax.algos.policy import ShapedRewardConfig, kl_in_reward, policy_algorithm, policy_batch
from rljax.algos.scores import scores_of
from rljax.losses.advantages import group_ids, group_mean, remax
from rljax.losses.masked import whiten
from rljax.losses.returns import on_last_token, reward_to_go
from rljax.types import Experience


@dataclass(frozen=True, kw_only=True)
class Config(ShapedRewardConfig):
    gamma: float  # discount per token
    baseline: Literal["none", "group", "greedy"]  # what is subtracted from a completion's reward
    whiten_advantages: bool  # normalise over all tokens of the rollout


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError for groups of one where a prompt needs two completions."""
    if config.baseline != "none" and group_size == 1:
        raise ValueError(f"baseline {config.baseline!r} takes two completions of a prompt; set rollout.group_size to 2")
    greedy = config.baseline == "greedy"

    def centred(experience: Experience) -> tuple[Experience, Float[Array, " b"]]:
        """The rows that are trained on, and their rewards over the baseline."""
        rewards = scores_of(config, experience)
        if greedy:
            groups = rewards.reshape(-1, group_size)
            return _without_greedy(experience, group_size), remax(groups[:, 1:], groups[:, :1]).reshape(-1)
        if config.baseline == "group":
            return experience, rewards - group_mean(rewards, group_ids(rewards.shape[0], group_size))
        return experience, rewards

    def targets(state: tuple, experience: Experience) -> tuple[tuple, Batch]:
        experience, scores = centred(experience)
        mask = experience.rollout.loss_mask
        rewards = on_last_token(scores, mask) - config.kl_coef * kl_in_reward(config, experience)
        returns = reward_to_go(rewards, mask, gamma=config.gamma)
        batch = policy_batch(config, experience, whiten(returns, mask) if config.whiten_advantages else returns)
        return state, {**batch, "raw_advantages": returns}

    algorithm = policy_algorithm(config, max_new_tokens, targets)
    return algorithm._replace(rows_per_prompt=group_size - 1, greedy_samples=1) if greedy else algorithm


def _without_greedy(experience: Experience, group_size: int) -> Experience:
    """A prompt's first completion is the greedy one."""
    return jax.tree.map(lambda x: x.reshape(-1, group_size, *x.shape[1:])[:, 1:].reshape(-1, *x.shape[1:]), experience)
