"""The tiny run as expert iteration: two rounds of samples, each with a fine-tuning of the base on all that was right.

python -m rljax.main --config tests/configs/expert_iteration.py --config.output_dir=/tmp/tiny
"""

from typing import Any

from ml_collections import ConfigDict

from tests.configs.tiny import get_config as tiny


def get_config() -> ConfigDict:
    config = tiny()
    config.name = "expert_iteration"
    config.recipe = ("sample_1", "learn_1", "sample_2", "learn_2")
    with config.unlocked():
        config.stages = ConfigDict(
            {
                "sample_1": sample(seed=0),
                "learn_1": learn("rollouts:sample_1"),
                "sample_2": sample(seed=1),
                "learn_2": learn("rollouts:sample_1,sample_2"),
            }
        )
    config.checkpoint.every_steps = 1
    return config


def sample(seed: int) -> dict[str, Any]:
    return {"algo": {"name": "collect"}, "steps": 2, "batch": {"minibatches": 1}, "data": {"seed": seed}}


def learn(samples: str) -> dict[str, Any]:
    return {
        "algo": {"name": "sft"},
        "steps": 2,
        "init_from": "base",
        "data": {"train": samples},
        "select": {"rule": "correct", "distinct": "text"},
        "batch": {"rows": 8, "minibatches": 1},
        "optim": {"learning_rate": 1e-2},
    }
