"""One constraint of IFBench by RLVR (2507.02833), on a model that a laptop trains: stories that link what they tell.

    python -m rljax.main --config configs/constraint_grpo.py

The verifier is IFBench's ``count:conjunctions``: at least four different ones of and, but, so, or, for, nor, yet.
Nothing in the prompt, a story's opening, asks for them; the reward alone does. Needs the folder RLJAX_DATA (default
../shared/data) with models/tinystories656K-hf and datasets/text.
Hardware: 2 CPU cores, minutes (LOG.md). Expected: the share of held-out stories that keep it (``eval/score``) rises.
"""

import os

from ml_collections import ConfigDict

from rljax.config import default_config

DATA = os.environ.get("RLJAX_DATA", "../shared/data")


def get_config() -> ConfigDict:
    config = default_config("grpo")
    config.name = "constraint_grpo"
    config.cpu_devices = 2
    config.model.path = f"{DATA}/models/tinystories656K-hf"
    config.data.train = config.data.dev = config.data.test = "stories"
    with config.unlocked():
        config.data.options = ConfigDict(
            {
                "path": f"{DATA}/datasets/text/tinystories_a.txt,{DATA}/datasets/text/tinystories_b.txt",
                "words": 0,
                "opening_sentences": 2,
                "max_prompt_chars": 120,
                "instruction": "count:conjunctions",
                "arguments": {"small_n": 4},
            }
        )
    config.data.dev_rows = 64
    config.data.test_rows = 128
    config.data.prompt_lengths = (40,)
    config.reward.names = ("ifeval",)

    config.steps = 16
    config.rollout.prompts_per_step = 32
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 96
    config.batch.minibatches = 4
    config.batch.micro_batch_rows = 16
    config.algo.kl_coef = 0.05
    config.algo.clip_low = 0.2
    config.algo.clip_high = 0.28
    config.algo.advantage_mean = "group"
    config.algo.advantage_std = "group"
    config.algo.aggregation = "token_mean"
    config.optim.learning_rate = 3e-4
    config.optim.warmup_steps = 5

    config.eval.temperature = 1.0
    config.eval.samples = 4
    config.eval.shown_prompts = 3
    config.checkpoint.every_steps = 8
    config.log.samples_per_step = 2
    return config
