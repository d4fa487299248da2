"""A control for the quickstart: no reinforcement learning, supervised training continued for the same time.

    python -m rljax.main --config configs/quickstart_more_text.py

Expected: held-out exact match stays near the warm start's. What GRPO gains is not more training.
"""

from ml_collections import ConfigDict

from configs.quickstart import get_config as quickstart

# As long as the quickstart's GRPO steps take on the machine of LOG.md, where a supervised step takes a tenth.
STEPS = 1000


def get_config() -> ConfigDict:
    config = quickstart()
    config.name = "quickstart_more_text"
    config.recipe = ("warm_start", "more_text")
    with config.unlocked():
        config.stages.more_text = ConfigDict(config.stages.warm_start.to_dict())
        config.stages.more_text.steps = STEPS
        config.stages.more_text.optim.schedule = "constant"
        config.stages.more_text.optim.learning_rate = 3e-4
    return config
