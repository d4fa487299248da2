"""RTO (2404.18922): PPO with token rewards from a DPO policy, ``β1 log(π_dpo / π_ref)``.

The guide is the DPO policy (``guide_from``), the reference the model that it was trained from. Over a completion the
unclamped rewards sum to β1 times the log-ratio of the sequence: a bonus with its credit spread.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.algos import ppo
from rljax.algos.base import Algorithm
from rljax.losses.kl import log_ratio
from rljax.losses.masked import zero_masked
from rljax.types import Experience


@dataclass(frozen=True, kw_only=True)
class Config(ppo.Config):
    guide_coef: float  # β1, which already includes DPO's β; 0 is plain PPO without a guide
    guide_clamp: float | None = None  # clip each token's reward from the guide to ± this (.05 in the paper's code)


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError where PPO does."""

    def guide_rewards(experience: Experience) -> Float[Array, "b t"]:
        assert experience.guide_logprobs is not None and experience.ref_logprobs is not None  # it is in needs
        mask = experience.rollout.loss_mask
        guide, ref = zero_masked(mask, experience.guide_logprobs, experience.ref_logprobs)
        rewards = config.guide_coef * log_ratio(guide, ref)
        return rewards if config.guide_clamp is None else jnp.clip(rewards, -config.guide_clamp, config.guide_clamp)

    if not config.guide_coef:
        return ppo.make(config, group_size=group_size, max_new_tokens=max_new_tokens)
    algorithm = ppo.make(config, group_size=group_size, max_new_tokens=max_new_tokens, token_rewards=guide_rewards)
    return algorithm._replace(needs=algorithm.needs | {"guide_logprobs", "ref_logprobs"})
