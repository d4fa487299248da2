"""RLOO (2402.14740): REINFORCE whose baseline is the mean reward of a prompt's other completions.

A completion is one action: its reward has the KL of the whole sequence in it. The paper's loss is surrogate reinforce
under sequence_mean_token_sum; several updates of one rollout want the clipped surrogate.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.algos.policy import (
    PolicyConfig,
    aggregation_of,
    kl_in_reward,
    policy_batch,
    policy_needs,
    policy_prepare,
    policy_terms,
)
from rljax.algos.scores import ScoreConfig, scores_of
from rljax.losses.advantages import broadcast_to_tokens, group_ids, leave_one_out
from rljax.losses.masked import masked_sum, whiten
from rljax.types import Experience, Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig, ScoreConfig):
    kl_in: Literal["loss", "reward"] = "reward"  # where the KL to the reference is charged
    kl_estimator: Literal["k1", "k2", "k3", "k4", "straight_through"] = "k1"  # k1 for the reward, others for the loss
    whiten_advantages: bool = False  # over the rollout's tokens; not in the paper


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError for groups of one, which have no others."""
    if group_size == 1:
        raise ValueError("the baseline is the other completions of a prompt; set rollout.group_size to 2 or more")
    needs, aggregation = policy_needs(config), aggregation_of(config, max_new_tokens)

    def targets(state: tuple, experience: Experience) -> tuple[tuple, Batch]:
        mask = experience.rollout.loss_mask
        rewards = scores_of(config, experience) - config.kl_coef * masked_sum(
            kl_in_reward(config, experience), mask, axis=-1
        )
        advantages = leave_one_out(rewards, group_ids(rewards.shape[0], group_size))
        tokens = broadcast_to_tokens(advantages, mask)
        batch = policy_batch(config, experience, whiten(tokens, mask) if config.whiten_advantages else tokens)
        return state, {**batch, "raw_advantages": tokens}

    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        return state, *policy_prepare(config, aggregation, batch, key)

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        return policy_terms(config, aggregation, outputs, batch)

    return Algorithm(needs=frozenset(needs), init=no_state, targets=targets, prepare=prepare, loss=loss)
