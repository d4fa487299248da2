"""MPO, mixed preference optimization (2403.19443): DPO on easy pairs, then PPO on the prompts of the difficult ones.

    python -m rljax.main --config configs/mpo.py

A pair is easy where its scores (columns ``chosen_score``, ``rejected_score``, a reward model's) differ by more than a
threshold. The DPO model is PPO's first policy and its reference. Not InternVL's loss of that name. The paper's settings
could not be read: those here are Tülu 2.5's. Hardware and results: not measured.
"""

from ml_collections import ConfigDict

from configs.tulu2p5 import REWARD_MODEL
from configs.tulu2p5 import get_config as tulu2p5


def get_config() -> ConfigDict:
    config = tulu2p5()
    config.name = "mpo"
    config.recipe = ("reward_model", "easy", "main")
    config.data.train = "scored_pairs.jsonl"
    config.data.options = {}
    with config.unlocked():
        config.stages = ConfigDict(
            {
                "reward_model": {**REWARD_MODEL, "select": {"gap": ""}},  # all pairs
                "easy": {
                    "algo": {"name": "dpo", "beta": 0.1},
                    "init_from": "base",
                    "steps": 1000,
                    "data": {"row_length": 2048},
                    "select": {"gap": "easy"},
                    "batch": {"rows": 32, "minibatches": 1, "epochs": 1},
                    "optim": {"learning_rate": 5e-7, "schedule": "linear"},
                },
            }
        )
    config.init_from = "easy"
    config.reference_from = "start"  # the DPO model
    config.select.gap = "difficult"
    config.select.gap_threshold = 1.0
    return config
