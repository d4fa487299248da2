"""GRPO on a real checkpoint: stories of real words that keep their hero, have ten sentences, end and do not repeat.

    python -m rljax.main --config configs/tinystories_grpo.py
    python -m rljax.drift --config configs/tinystories_grpo.py --model=runs/tinystories_grpo/model

Needs the folder RLJAX_DATA (default ../shared/data) with models/tinystories656K-hf and datasets/text.
Hardware: 2 CPU cores, 2 min 40 s. Expected: the share of held-out stories that keep all demands but the first
(``eval/score``) rises from 0.46 to 0.73 (LOG.md); the second command says what that cost in KL, likelihood and variety,
and whether picking the best of four would have done as well.
"""

import os

from ml_collections import ConfigDict

from rljax.config import default_config

DATA = os.environ.get("RLJAX_DATA", "../shared/data")


def get_config() -> ConfigDict:
    config = default_config("grpo")
    config.name = "tinystories_grpo"
    config.cpu_devices = 2
    config.model.path = f"{DATA}/models/tinystories656K-hf"
    config.data.train = config.data.dev = config.data.test = "stories"
    with config.unlocked():
        config.data.options = ConfigDict(
            {
                "path": f"{DATA}/datasets/text/tinystories_a.txt,{DATA}/datasets/text/tinystories_b.txt",
                "words": 1,
                "words_from": "hero",
                "opening_sentences": 2,
                "max_prompt_chars": 120,
                "min_occurrences": 20,
                "min_sentences": 10,
            }
        )
    config.data.dev_rows = 64
    config.data.test_rows = 108
    config.data.prompt_lengths = (40,)
    config.reward.names = ("story", "real_words")
    config.reward.weights = (0.5, 1.0)

    config.steps = 20
    config.rollout.prompts_per_step = 32
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 192
    config.batch.minibatches = 4
    config.algo.kl_coef = 0.05
    config.algo.clip_low = 0.2
    config.algo.clip_high = 0.28
    config.algo.advantage_mean = "group"
    config.algo.advantage_std = "group"
    config.algo.aggregation = "token_mean"
    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 10

    config.eval.temperature = 1.0
    config.eval.samples = 4
    config.eval.every_steps = 10
    config.eval.shown_prompts = 3
    config.checkpoint.every_steps = 10
    config.log.samples_per_step = 3
    return config
