"""Zephyr (2310.16944): dSFT on UltraChat, then dDPO on UltraFeedback, each best answer against a random other.

    python -m rljax.main --config configs/zephyr.py             the values of the alignment handbook
    python -m rljax.main --config configs/zephyr.py:paper       those of the paper, where it differs
    python -m rljax.main --config configs/zephyr.py --dry_run

Hardware: not measured here. Expected (the authors'): MT-Bench 7.34, AlpacaEval 90.6 %. DPO over-fits its training
accuracy and still improves. To go beyond it: ``python -m rljax.expo --weak ... --strong ... --alpha 0.3``.
"""

from ml_collections import ConfigDict

from rljax.config import default_config

CHATS = 207_865  # of UltraChat 200k's card
PAIRS = 61_135  # of UltraFeedback binarized's card


def get_config() -> ConfigDict:
    config = default_config("dpo")
    config.name = "zephyr_handbook"
    config.recipe = ("sft", "main")
    config.model.path = "mistralai/Mistral-7B-v0.1"
    config.model.remat = "block"
    config.compute_dtype = "bfloat16"
    config.tokenizer.template = "chat"
    config.mesh = "1,-1,1"
    with config.unlocked():
        config.stages.sft = ConfigDict(
            {
                "algo": {"name": "sft"},
                "steps": CHATS // 128,  # 1 epoch
                "data": {
                    "train": "HuggingFaceH4/ultrachat_200k",
                    "options": {"split": "train_sft"},
                    "row_length": 2048,
                },
                "batch": {"rows": 128, "micro_batch_rows": 32},
                "optim": {"learning_rate": 2e-5, "schedule": "cosine", "warmup_fraction": 0.1},
            }
        )
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized"
    config.data.options = {"split": "train_prefs"}
    config.data.row_length = 1024
    config.data.prompt_lengths = (512,)
    config.data.bad_rows = "drop"
    config.algo.beta = 0.01
    config.batch.rows = 128
    config.batch.micro_batch_rows = 64
    config.steps = PAIRS // 128  # 1 epoch
    config.optim.learning_rate = 5e-7
    config.optim.schedule = "cosine"
    config.optim.warmup_fraction = 0.1
    config.checkpoint.every_steps = 100
    return config


def paper() -> ConfigDict:
    config = get_config()
    config.name = "zephyr_paper"
    config.algo.beta = 0.1
    config.optim.schedule = "linear"
    config.steps = 3 * PAIRS // 128  # about 3 epochs
    return config


VARIANTS = {"handbook": get_config, "paper": paper}
