"""The tiny run as expert iteration: two rounds of samples, each with a fine-tuning of the base on all that was right.

python -m rljax.main --config tests/configs/expert_iteration.py --config.output_dir=/tmp/tiny
"""

from ml_collections import ConfigDict

from tests.configs.tiny import get_config as tiny


def get_config() -> ConfigDict:
    config = tiny()
    config.name = "expert_iteration"
    config.recipe = ("sample_1", "learn_1", "sample_2", "learn_2")
    sample = {"algo": {"name": "collect"}, "steps": 2, "batch": {"minibatches": 1}}
    learn = {
        "algo": {"name": "sft"},
        "steps": 2,
        "init_from": "base",
        "select": {"rule": "correct", "distinct": "text"},
        "batch": {"rows": 8, "minibatches": 1},
    }
    with config.unlocked():
        config.stages = ConfigDict(
            {
                "sample_1": sample,
                "learn_1": {**learn, "data": {"train": "rollouts:sample_1"}},
                "sample_2": {**sample, "data": {"seed": 1}},
                "learn_2": {**learn, "data": {"train": "rollouts:sample_1,sample_2"}},
            }
        )
    config.checkpoint.every_steps = 1
    return config
