"""GRPO on the real GSM8K with Qwen2.5-0.5B-Instruct, on one accelerator.

    python -m rljax.main --config configs/gsm8k_grpo_qwen2p5_0p5b.py
    ... --config.model.path=/models/Qwen2.5-0.5B-Instruct        where there is no network
    ... --dry_run --config.device_memory_gib=24                  checks and the memory plan, on any machine

Data: ``datasets/gsm8k/{train,test}.jsonl`` under ``$RLJAX_DATA`` (default ../shared/data), or
``--config.data.train=openai/gsm8k --config.data.test=openai/gsm8k --config.data.options.name=main``.
Hardware: one accelerator with 24 GiB or more. Time: not measured.
Expected: not measured. Elsewhere, on the 1,319 test problems: 36.4 % for the checkpoint as its makers report it, 56.7 %
after PPO and 54.3 % after GRPO with LoRA (verl's page of baselines).
"""

import os

from ml_collections import ConfigDict

from rljax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("grpo")
    config.name = "gsm8k_grpo_qwen2p5_0p5b"
    config.model.path = "Qwen/Qwen2.5-0.5B-Instruct"
    config.compute_dtype = "bfloat16"
    config.model.remat = "block"

    config.tokenizer.template = "chat"
    # The instruction for mathematics of Qwen2.5's model cards.
    config.tokenizer.system_prompt = "Please reason step by step, and put your final answer within \\boxed{}."
    config.data.train = config.data.test = os.path.join(
        os.environ.get("RLJAX_DATA", "../shared/data"), "datasets/gsm8k"
    )
    config.data.columns = {"prompt": "question", "answer": "answer"}
    config.data.dev_rows = 256
    config.data.prompt_lengths = (256,)  # the longest of the 7,473 has 244 tokens
    config.reward.names = ("gsm8k",)

    # GRPO as DeepSeekMath has it (2402.03300): one update a rollout, advantages by group, learning rate 1e-6. Groups of
    # 8 instead of 64 and the smaller KL coefficient are those of verl's examples for GSM8K, with its mean over tokens.
    config.algo.kl_coef = 0.001
    config.algo.clip_low = 0.2
    config.algo.clip_high = 0.2
    config.algo.advantage_mean = "group"
    config.algo.advantage_std = "group"
    config.algo.aggregation = "token_mean"
    config.optim.learning_rate = 1e-6
    config.optim.warmup_steps = 10
    config.steps = 330  # three epochs
    config.rollout.prompts_per_step = 64
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 512
    config.batch.micro_batch_rows = 16

    config.eval.every_steps = 20
    config.eval.prompts_per_batch = 256
    config.checkpoint.every_steps = 20
    config.log.samples_per_step = 3
    return config
