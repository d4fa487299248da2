"""Tricks or traps (2508.08221): Lite PPO, and the GRPO and DAPO that it is compared with, on Qwen3 for mathematics.

    python -m rljax.main --config configs/tricks_or_traps.py            Lite PPO
    python -m rljax.main --config configs/tricks_or_traps.py:grpo       or :dapo
    ... --config.model.path=Qwen/Qwen3-8B-Base

Truncated sampling (top-p .99, top-k 100) is theirs; log-probs here are of the truncated distribution on both sides,
theirs of the whole one. Hardware: not measured here. Expected (theirs, curves only): 8B base on hard data, MATH-500
about 80.
"""

from ml_collections import ConfigDict

from rljax.config import default_config


def study(name: str) -> ConfigDict:
    """What the three share; PPO's loss with a symmetric clip, one epoch, no KL."""
    config = default_config("grpo")
    config.name = name
    config.seed = config.data.seed = 42
    config.model.path = "Qwen/Qwen3-4B-Base"
    config.model.remat = "block"
    config.compute_dtype = "bfloat16"
    config.mesh = "1,-1,2"
    config.tokenizer.template = "reasoning"
    config.data.train = "deepmath_5k.jsonl"  # 5,000 problems of one difficulty, surplus True/False answers removed
    config.data.prompt_lengths = (1024,)
    config.reward.names = ("math",)
    config.algo.kl_coef = 0.0
    config.algo.clip_low = config.algo.clip_high = 0.2
    config.algo.advantage_mean = "group"
    config.rollout.prompts_per_step = 128
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 8192  # in the text; the authors' file says 8000
    config.rollout.temperature = 0.99
    config.rollout.top_p = 0.99
    config.rollout.top_k = 100
    config.batch.epochs = 1
    config.batch.micro_batch_rows = 32
    config.steps = 500
    config.optim.learning_rate = 1e-6
    config.optim.weight_decay = 0.0
    config.optim.warmup_steps = 50
    config.checkpoint.every_steps = 50
    return config


def get_config() -> ConfigDict:
    """Mean of the group, deviation of the batch, token mean: nothing else."""
    config = study("lite_ppo")
    config.algo.advantage_std = "batch"
    config.algo.aggregation = "token_mean"
    return config


def grpo() -> ConfigDict:
    config = study("grpo")
    config.algo.advantage_std = "group"
    config.algo.aggregation = "sequence_mean_token_mean"
    return config


def dapo() -> ConfigDict:
    """Clip-higher, token mean, groups that are all right or all wrong refilled, a soft penalty of overlong answers."""
    config = study("dapo")
    config.algo.advantage_std = "group"
    config.algo.aggregation = "token_mean"
    config.algo.clip_high = 0.28
    config.algo.overlong_buffer = 1024  # of the budget; verl's recipe has 4,096 of 20,480
    config.rollout.keep_groups = "mixed"
    config.rollout.max_rounds = 3  # verl draws 1,536 prompts for 512
    return config


def aligned() -> ConfigDict:
    """The guideline for aligned models: sequence mean, and the higher clip that was best at 8B."""
    config = get_config()
    config.name = "lite_ppo_aligned"
    config.model.path = "Qwen/Qwen3-8B"
    config.tokenizer.template = "chat"
    config.algo.aggregation = "sequence_mean_token_mean"
    config.algo.clip_high = 0.28
    return config


VARIANTS = {"lite_ppo": get_config, "grpo": grpo, "dapo": dapo, "aligned": aligned}
