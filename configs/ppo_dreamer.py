"""PPO with DreamerV3's tricks (PPO-v3, 2310.17805) on the quickstart's arithmetic, where a right answer earns 100.

    python -m rljax.main --config configs/ppo_dreamer.py
    python -m rljax.main --config configs/ppo_dreamer.py:plain      the same without the tricks

The tricks: a two-hot critic over symlog bins with a head of zeros, drawn towards its own running mean; advantages over
the running spread of returns; 1 % of the policy even over the vocabulary. The paper's finding is that they stand in for
reward clipping, so rewards are far from 1 here; nothing else of its games is left. Its code draws the critic towards
the mean's distribution and averages the head alone; here, as in DreamerV3 (2301.04104), towards the mean's value, of
the whole critic, and the mean moves after each rollout by all of its updates at once.

Hardware: 2 CPU cores. Expected: LOG.md.
"""

from ml_collections import ConfigDict

from configs.quickstart import get_config as quickstart
from rljax.config import algo_defaults


def get_config() -> ConfigDict:
    config = quickstart()
    config.name = "ppo_dreamer"
    with config.unlocked():
        config.algo = algo_defaults("ppo")
    config.algo.update(
        {
            "value_loss": "two_hot",
            "value_bins": 256,  # from -20 to 20
            "value_ema_coef": 1.0,
            "value_ema_decay": 0.98,
            "scale_by_percentile": True,  # decay .99, of P95 - P5
            "whiten_advantages": "none",  # it would undo the scaling
            "kl_coef": 0.0,
            "clip_low": 0.1,
            "clip_high": 0.1,
            "value_clip": 0.1,  # a two-hot critic has none
            "value_coef": 0.5,
            "entropy_coef": 0.01,
            "gamma": 0.99,
            "lam": 0.95,
            "aggregation": "token_mean",
        }
    )
    config.reward.weights = (100.0,)
    config.rollout.unimix = 0.01
    config.rollout.prompts_per_step = 256
    config.rollout.group_size = 1
    config.batch.epochs = 4
    config.batch.minibatches = 4
    config.batch.micro_batch_rows = 64
    config.steps = 40
    config.clip_scope = "joint"
    for optim in (config.optim, config.critic.optim):
        optim.learning_rate = 2.5e-4
        optim.schedule = "linear"
        optim.warmup_steps = 0
        optim.eps = 1e-5
        optim.clip_norm = 0.5
    return config


def plain() -> ConfigDict:
    """PPO as the paper's baseline has it: squared and clipped values, whitened advantages, no running mean."""
    config = get_config()
    config.name = "ppo_plain"
    config.algo.update(
        {
            "value_loss": "clipped",
            "value_ema_coef": 0.0,
            "scale_by_percentile": False,
            "whiten_advantages": "minibatch",
        }
    )
    config.rollout.unimix = 0.0
    return config


VARIANTS = {"tricks": get_config, "plain": plain}
