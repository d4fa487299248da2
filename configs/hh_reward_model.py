"""A small reward model of hh-rlhf's helpful-base pairs, beside what the length of the answers says alone.

    python -m rljax.main --config configs/hh_reward_model.py --config.seed=0 --config.data.seed=0

Needs the folder RLJAX_DATA (default ../shared/data) with models/tinystories656K-hf and datasets/prefs. The 2,354 pairs
are split by prompt, eight tenths to train; data.seed chooses the split and the order. Pairs whose sides continue
different prompts (11) are left out, so are those longer than 256 tokens. Hardware: 2 CPU cores, about 5 minutes.
Expected: LOG.md.
"""

import os

from ml_collections import ConfigDict

from rljax.config import default_config

DATA = os.environ.get("RLJAX_DATA", "../shared/data")


def get_config() -> ConfigDict:
    config = default_config("reward_model")
    config.name = "hh_reward_model"
    config.cpu_devices = 1
    config.model.path = f"{DATA}/models/tinystories656K-hf"
    config.data.train = f"{DATA}/datasets/prefs/hh_helpful_base_test.jsonl.gz"
    config.data.splits_by_prompt = True
    config.data.bad_rows = "drop"
    config.data.row_length = 256

    config.algo.loss = "bradley_terry"
    config.algo.centering_coef = 0.01  # 2312.09244
    config.steps = 80  # three epochs
    config.batch.rows = 32
    config.batch.micro_batch_rows = 32
    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 10
    config.optim.schedule = "cosine"
    config.eval.every_steps = 40
    return config
