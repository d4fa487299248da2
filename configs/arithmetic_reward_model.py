"""A reward model of sums, from pairs that a small policy sampled and their verifier labelled; and what it picks.

    python -m rljax.main --config configs/arithmetic_reward_model.py
    python -m rljax.main --config configs/arithmetic_reward_model.py:linear
    python -m rljax.main --config configs/arithmetic_reward_model.py:ranking

Model, sums and text are the quickstart's, but for fewer guesses (30 %): a guess that happens to be right cannot be told
from one that is not. A pair is the best of a prompt's eight samples against a random worse one. Of the held-out
problems there are eight samples each too: ``sample_accuracy`` is the share of their pairs of unequal truth that the
model orders right, ``best_of_8`` the true reward of what it picks. In the second form the truth is a hidden linear
function of the digits, the policy is random and both models are smaller; in the third the model learns from whole
rankings of eight.

Hardware: 2 CPU cores, a minute or two when quiet. Expected: LOG.md.
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
        config.data.options.guess_share = 0.3
        config.stages = ConfigDict(
            {
                "warm_start": {
                    **base.stages.warm_start,
                    "data": {"train": "arithmetic"},
                    "select": {"rule": ""},
                },
                "sample": {
                    "algo": {"name": "collect"},
                    "steps": 100,
                    "data": {"train": "arithmetic"},
                    "batch": {"rows": 0},
                    "select": {"rule": ""},
                },
            }
        )
    config.data.train = "rollouts:sample"
    config.data.train_rows, config.data.dev_rows, config.data.test_rows = 4096, 0, 160
    config.data.dev = ""
    config.select.rule = "pairs"

    config.algo.loss = "bradley_terry"
    config.algo.centering_coef = 0.01
    config.steps = 500
    config.batch.rows = 32
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 10

    config.eval.temperature = 1.0
    config.eval.samples = 8
    config.eval.prompts_per_batch = 64
    config.checkpoint.every_steps = 200
    return config


def linear() -> ConfigDict:
    config = get_config()
    config.name = "linear_reward_model"
    config.recipe = ("sample", "main")
    config.algo.centering_coef = 0.0
    config.reward.names = ("tests.tiny:hidden_linear",)
    config.model.architecture.update({"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16})
    config.data.options.update({"bounds": (2, 3, 9), "guess_share": 0.6})
    config.data.train_rows = 1400
    config.rollout.max_new_tokens = 56  # a random policy ends late, and pairs are made of completions that ended
    config.data.row_length = 66
    return config


def ranking() -> ConfigDict:
    config = linear()
    config.name = "ranking_reward_model"
    config.select.rule = "ranking"
    config.algo.loss = "plackett_luce"
    config.algo.answers = config.select.per_prompt = 8  # a prompt that was drawn twice has more
    config.batch.rows = 16
    return config


VARIANTS = {"verifier": get_config, "linear": linear, "ranking": ranking}
