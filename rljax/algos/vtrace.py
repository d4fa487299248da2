"""V-trace actor-critic (IMPALA, 1802.01561): targets and advantages corrected for rollouts of an older policy.

The weights are proximal over behaviour, so a rollout may come from an earlier version (``staleness``) or from a sampler
of another precision; the advantages carry ρ and take a plain policy gradient. Cleanba's IMPALA (2310.00036) sums over
tokens; here aggregation says.
"""

from dataclasses import dataclass
from typing import Literal

import jax

from rljax.algos.base import Algorithm, Batch
from rljax.algos.critic import CriticLossConfig, as_value, critic_batch, value_terms, with_critic
from rljax.algos.policy import ShapedRewardConfig, kl_in_reward, policy_algorithm, policy_batch
from rljax.algos.scores import scores_of
from rljax.losses.returns import on_last_token, vtrace
from rljax.types import Experience, Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config(ShapedRewardConfig, CriticLossConfig):
    gamma: float  # discount per token
    rho_clip: float  # ρ̄, largest weight in targets and advantages
    c_clip: float  # c̄, largest weight of later corrections
    surrogate: Literal["clipped", "gspo", "gspo_token", "cispo", "gmpo", "sapo", "reinforce"] = (
        "reinforce"  # token loss; its ratio is current over behavior
    )


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError for a second correction of the same weights."""
    if config.correction != "none":
        raise ValueError("V-trace corrects for the sampler itself; set correction to 'none'")

    def targets(state: tuple, experience: Experience) -> tuple[tuple, Batch]:
        mask = experience.rollout.loss_mask
        assert experience.values is not None and experience.proximal_logprobs is not None  # it is in needs
        values = as_value(config, experience.values)
        rewards = on_last_token(scores_of(config, experience), mask)
        advantages, returns = vtrace(
            experience.proximal_logprobs,
            experience.rollout.behavior_logprobs,
            rewards - config.kl_coef * kl_in_reward(config, experience),
            values,
            mask,
            gamma=config.gamma,
            rho_clip=config.rho_clip,
            c_clip=config.c_clip,
        )
        batch = policy_batch(config, experience, advantages) | critic_batch(config, experience, values, returns)
        return state, jax.lax.stop_gradient(batch)

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        return plain.loss(outputs, batch) | value_terms(config, outputs, batch)

    plain = policy_algorithm(config, max_new_tokens, targets)
    return with_critic(config, plain._replace(needs=plain.needs | {"proximal_logprobs"}, loss=loss))
