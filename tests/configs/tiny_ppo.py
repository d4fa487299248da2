"""The smallest run with a critic: a warm start, then PPO-max from rollouts that are one version old.

python -m rljax.main --config tests/configs/tiny_ppo.py --config.output_dir=/tmp/tiny_ppo
"""

from ml_collections import ConfigDict

from rljax.config import algo_defaults
from tests.configs import tiny


def get_config() -> ConfigDict:
    config = tiny.get_config()
    config.name = "tiny_ppo"
    config.mesh = "1,1,1"
    config.steps = 4
    config.unlock()
    config.algo = algo_defaults("ppo_max")
    config.algo.update(
        {
            "kl_coef": 0.05,
            "kl_target": 1.0,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "token_mean",
            "value_coef": 0.1,
            "value_clip": 0.2,
            "value_ema_coef": 0.5,
            "gamma": 1.0,
            "lam": 0.95,
            "whiten_advantages": "minibatch",
            "normalized_clip": 10.0,
        }
    )
    config.rollout.lag = 1
    config.critic.optim.learning_rate = 1e-2
    config.optim.freeze_steps = 2
    config.stages.warm_start.optim.freeze_steps = 0
    config.eval.every_steps = 0
    config.checkpoint.every_steps = 0
    config.lock()
    return config
