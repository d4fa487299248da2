"""OLMo 2 (2501.00656): Tülu 3's pipeline on another base. **Waits for its family**: ``olmo2`` is not among rljax's.

    python -m rljax.main --config configs/olmo2.py --print_config
    python -m rljax.main --config configs/olmo2.py:grpo --print_config      32B and 1B

A run is refused, with a sentence, until the family is here. 7B and 13B of November 2024 used PPO; 32B and 1B GRPO, a
stage on mixed prompts, then one on MATH only. Expected: not measured.
"""

from ml_collections import ConfigDict

from configs.tulu3 import grpo as tulu3_grpo
from configs.tulu3 import ppo as tulu3_ppo


def get_config() -> ConfigDict:
    config = tulu3_ppo()
    config.name = "olmo2_ppo"
    config.model.path = "allenai/OLMo-2-1124-7B-DPO"
    return config


def grpo() -> ConfigDict:
    """Rate 5e-7, KL .01 and 48 x 16 samples (docs of open-instruct), which are Tülu 3.1's."""
    config = tulu3_grpo()
    config.name = "olmo2_grpo"
    config.model.path = "allenai/OLMo-2-0325-32B-DPO"
    config.recipe = ("main", "math")
    with config.unlocked():
        config.stages.math = ConfigDict({"data": {"train": "allenai/RLVR-MATH"}})
    return config


VARIANTS = {"ppo": get_config, "grpo": grpo}
