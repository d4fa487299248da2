"""A reward model of sums, from pairs that a small policy sampled and their verifier labelled; and what it picks.

    python -m rljax.main --config configs/arithmetic_reward_model.py

The text is of mixed quality, as the quickstart's. A pair is the best of a prompt's eight samples against a random worse
one. Held out are 256 problems with eight samples each: ``sample_accuracy`` is the share of their (right, wrong) pairs
that the model orders right, ``best_of_8`` the share right of what it picks from all eight.
With ``config.reward.names='["tests.tiny:hidden_linear"]'`` the truth is a hidden linear function of the digits instead.

Hardware: 2 CPU cores, about 2 minutes when quiet. Expected: LOG.md.
"""

from ml_collections import ConfigDict

from configs.quickstart import get_config as quickstart
from rljax.config import default_config


def get_config() -> ConfigDict:
    base, config = quickstart(), default_config("reward_model")
    config.name = "arithmetic_reward_model"
    config.cpu_devices = 1
    config.recipe = ("warm_start", "sample", "main")
    with config.unlocked():
        config.update({name: base[name] for name in ("tokenizer", "model", "data", "rollout", "reward")})
        config.model.architecture.update({"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16})
        config.stages = ConfigDict(
            {
                "warm_start": {
                    **base.stages.warm_start,
                    "steps": 500,
                    "data": {"train": "arithmetic", "train_rows": 4096},
                    "select": {"rule": ""},
                },
                "sample": {
                    "algo": {"name": "collect"},
                    "steps": 64,
                    "data": {"train": "arithmetic"},
                    "batch": {"rows": 0},
                    "select": {"rule": ""},
                },
            }
        )
    config.data.train = "rollouts:sample"
    config.data.test_rows = 256
    config.select.rule = "pairs"

    config.algo.loss = "bradley_terry"
    config.algo.centering_coef = 0.01
    config.steps = 200
    config.batch.rows = 32
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 10

    config.eval.temperature = 1.0
    config.eval.samples = 8
    config.eval.prompts_per_batch = 64
    config.checkpoint.every_steps = 200
    return config
