"""Teaching large language models to reason with RL (2403.04642) on GSM8K: expert iteration, PPO, return conditioning.

    python -m rljax.main --config configs/teaching_reasoning.py                 expert iteration, four rounds
    python -m rljax.main --config configs/teaching_reasoning.py:rejection       one round (rejection sampling)
    python -m rljax.main --config configs/teaching_reasoning.py:raft            best of a group, going on from the last
    python -m rljax.main --config configs/teaching_reasoning.py:returns         return-conditioned RL
    python -m rljax.main --config configs/teaching_reasoning.py:ppo

Every round of expert iteration fine-tunes the **first** checkpoint on all rounds' distinct right answers. Data:
``datasets/gsm8k`` under ``$RLJAX_DATA``. Hardware: not measured here. Expected (theirs): expert iteration is best in
most settings.
"""

import os
from typing import Any

from ml_collections import ConfigDict

from rljax.config import default_config

ROUNDS = 4  # given as 4 and as 5 in the paper
SAMPLES = 96  # K, of a question
QUESTIONS = 7_473
PER_STEP = 64  # questions sampled at a time


def gsm8k(algo: str, name: str) -> ConfigDict:
    config = default_config(algo)
    config.name = name
    config.model.path = "meta-llama/Llama-2-7b-hf"
    config.model.remat = "block"
    config.compute_dtype = "bfloat16"
    config.mesh = "1,-1,4"
    config.tokenizer.template = "question"
    data = os.path.join(os.environ.get("RLJAX_DATA", "../shared/data"), "datasets/gsm8k")
    config.data.train = config.data.dev = config.data.test = data
    config.data.columns = {"prompt": "question", "solution": "answer"}
    config.data.dev_rows = 256
    config.data.prompt_lengths = (256,)
    config.data.row_length = 768
    config.reward.names = ("gsm8k",)
    config.rollout.max_new_tokens = 512
    config.rollout.temperature = 1.0
    config.eval.samples = 96  # maj@96 and pass@96 beside the score
    config.eval.temperature = 0.7
    config.eval.greedy = True  # maj@1 is a greedy answer
    config.checkpoint.every_steps = 50
    return config


def sample() -> dict[str, Any]:
    return {
        "algo": {"name": "collect"},
        "steps": QUESTIONS // PER_STEP,
        "rollout": {"prompts_per_step": PER_STEP, "group_size": SAMPLES},
    }


def learn(stages: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "algo": {"name": "sft"},
        "steps": 500,
        "init_from": "base",
        "data": {"train": f"rollouts:{','.join(stages)}"},
        "select": {"rule": "correct", "distinct": "equations"},
        "batch": {"rows": 128, "micro_batch_rows": 32},
        "optim": {"learning_rate": 1e-5, "schedule": "cosine", "warmup_fraction": 0.03},
        **changes,
    }


def with_stages(config: ConfigDict, stages: dict[str, Any]) -> ConfigDict:
    config.recipe = tuple(stages)
    with config.unlocked():
        config.stages = ConfigDict(stages)
    return config


def expert_iteration(rounds: int, name: str) -> ConfigDict:
    stages: dict[str, Any] = {}
    for number in range(1, rounds + 1):
        stages[f"sample_{number}"] = sample()
        stages[f"learn_{number}"] = learn([f"sample_{earlier}" for earlier in range(1, number + 1)])
    return with_stages(gsm8k("sft", name), stages)


def get_config() -> ConfigDict:
    return expert_iteration(ROUNDS, "expert_iteration")


def rejection() -> ConfigDict:
    return expert_iteration(1, "rejection_sampling")


def raft() -> ConfigDict:
    """RAFT (2304.06767): the best of each group, of this round only; training goes on from the last round."""
    stages: dict[str, Any] = {}
    for number in range(1, ROUNDS + 1):
        stages[f"sample_{number}"] = sample()
        stages[f"learn_{number}"] = learn([f"sample_{number}"], init_from="previous", select={"rule": "best"})
    return with_stages(gsm8k("sft", "raft"), stages)


def returns() -> ConfigDict:
    """All samples train, each behind the label of its return; evaluations ask for the good one."""
    config = gsm8k("sft", "return_conditioned")
    labels = ("[BAD] ", "[GOOD] ")
    learned = learn(["sample_1"], select={"rule": "returns", "distinct": "text", "labels": labels})
    config.data.prompt_prefix = labels[1]
    return with_stages(config, {"sample_1": {**sample(), "data": {"prompt_prefix": ""}}, "learn_1": learned})


def ppo() -> ConfigDict:
    config = gsm8k("ppo", "ppo")
    config.algo.update(
        {
            "kl_coef": 0.05,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "value_clip": 0.2,
            "value_coef": 0.1,
            "gamma": 1.0,
            "lam": 0.95,
            "whiten_advantages": "rollout",
            "aggregation": "token_mean",
        }
    )
    config.rollout.prompts_per_step = 128
    config.rollout.group_size = 1
    config.steps = 1000
    config.batch.micro_batch_rows = 32
    return config


VARIANTS = {"expert_iteration": get_config, "rejection": rejection, "raft": raft, "returns": returns, "ppo": ppo}
