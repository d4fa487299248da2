"""RLOO (2402.14740): REINFORCE with the mean reward of a prompt's other completions as baseline.

A completion is one action: its reward has the KL of the whole sequence in it. The paper's loss is surrogate reinforce
under sequence_mean_token_sum; several updates of one rollout want the clipped surrogate.
"""

from dataclasses import dataclass

from rljax.algos.base import Algorithm, Batch
from rljax.algos.policy import ShapedRewardConfig, kl_in_reward, policy_algorithm, policy_batch
from rljax.algos.scores import scores_of
from rljax.losses.advantages import broadcast_to_tokens, group_ids, leave_one_out
from rljax.losses.masked import masked_sum, whiten
from rljax.types import Experience


@dataclass(frozen=True, kw_only=True)
class Config(ShapedRewardConfig):
    whiten_advantages: bool = False  # normalise over the rollout's tokens; not in the paper


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError for groups of one, which have no others."""
    if group_size == 1:
        raise ValueError("the baseline is the other completions of a prompt; set rollout.group_size to 2 or more")

    def targets(state: tuple, experience: Experience) -> tuple[tuple, Batch]:
        mask = experience.rollout.loss_mask
        rewards = scores_of(config, experience) - config.kl_coef * masked_sum(
            kl_in_reward(config, experience), mask, axis=-1
        )
        advantages = leave_one_out(rewards, group_ids(rewards.shape[0], group_size))
        tokens = broadcast_to_tokens(advantages, mask)
        batch = policy_batch(config, experience, whiten(tokens, mask) if config.whiten_advantages else tokens)
        return state, {**batch, "raw_advantages": tokens}

    return policy_algorithm(config, max_new_tokens, targets)
