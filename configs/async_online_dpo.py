"""Online DPO as asynchronous RLHF (2410.18252) runs it: two samples a prompt, a reward model says which is better.

    python -m rljax.main --config configs/async_online_dpo.py
    python -m rljax.main --config configs/async_online_dpo.py:stale      64 mini-batches a round of generation
    python -m rljax.main --config configs/async_online_dpo.py:online --config.rollout.lag=0         in step

Waits for Pythia's family (``gpt_neox``); any other model runs it. Here generation and training take turns on the same
devices. Hardware: not measured here. Expected (theirs): Online DPO alone still learns with 64 mini-batches a round.
"""

from ml_collections import ConfigDict

from rljax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("online_dpo")
    config.name = "online_dpo"
    config.model.path = "EleutherAI/pythia-410m-deduped"
    config.compute_dtype = "bfloat16"
    config.data.train = "tldr/train.jsonl"
    config.data.prompt_lengths = (512,)
    config.reward_model_from = "tldr/pythia-6.9b-reward-model"  # the gold reward model
    config.algo.beta = 0.1
    config.algo.missing_end = "replace"
    config.algo.missing_end_value = -1.0
    config.rollout.prompts_per_step = 256  # 512 completions a mini-batch
    config.rollout.group_size = 2  # K
    config.rollout.max_new_tokens = 53
    config.rollout.lag = 1  # the learner trains on samples of θ_{t-1}
    config.rollout.temperature = 0.7  # and of the loss: masks and temperature must match
    config.batch.minibatches = 1  # N
    config.batch.micro_batch_rows = 64
    config.steps = 256  # 131,072 episodes
    config.optim.learning_rate = 3e-6
    config.optim.schedule = "linear"
    config.checkpoint.every_steps = 32
    return config


def stale() -> ConfigDict:
    """N = 64: as many episodes, in four rounds of generation."""
    config = get_config()
    config.name = "online_dpo_stale"
    config.rollout.lag = 0  # generation and training in turn: the 64 updates alone make samples old
    config.rollout.prompts_per_step = 256 * 64
    config.batch.minibatches = 64
    config.steps = 4
    return config


VARIANTS = {"online": get_config, "stale": stale}
