"""A control for the quickstart: GRPO with rewards permuted across the batch. There is nothing to learn from them.

    python -m rljax.main --config configs/quickstart_permuted.py

Expected: held-out exact match does not rise above the warm start's interval.
"""

from ml_collections import ConfigDict

from configs.quickstart import get_config as quickstart


def get_config() -> ConfigDict:
    config = quickstart()
    config.name = "quickstart_permuted"
    config.reward.permute = True
    return config
