"""GRPO on the real GSM8K with Qwen3-8B, on a TPU v5e-16 slice (16 chips, 4 hosts).

On every host of the slice (tpu_scripts/ does it; the output folder has to be one that all hosts see):

    python -m rljax.main --config configs/gsm8k_grpo_qwen3_8b_v5e_16.py --config.output_dir=gs://bucket/qwen3-8b

The checks and the memory plan, on a laptop (``--config.model.path=FOLDER`` where there is no network; a folder with
config.json and the tokenizer is enough):

    python -m rljax.main --config configs/gsm8k_grpo_qwen3_8b_v5e_16.py --config.cpu_devices=16 --dry_run

Data: ``datasets/gsm8k/{train,test}.jsonl`` under ``$RLJAX_DATA`` (default ../shared/data), or
``--config.data.train=openai/gsm8k --config.data.test=openai/gsm8k --config.data.options.name=main``.
Hardware: 16 TPU v5e chips of 16 GiB. Compiled for them ahead of time (libtpu 0.0.42), rollouts take 14.1 GiB of a chip
and updates 12.8. Time: not measured. Expected: not measured.
"""

import os

from ml_collections import ConfigDict

from rljax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("grpo")
    config.name = "gsm8k_grpo_qwen3_8b_v5e_16"
    config.model.path = "Qwen/Qwen3-8B"
    config.compute_dtype = "bfloat16"
    config.mesh = "1,4,4"
    config.device_memory_gib = 15.75  # what the compiler may use of a v5e chip
    config.model.remat = "block"
    config.model.logits_chunk = 512

    config.tokenizer.template = "chat"
    # The instruction for mathematics of Qwen3's model card; /no_think is its switch for answers without long thoughts.
    config.tokenizer.system_prompt = "Please reason step by step, and put your final answer within \\boxed{}. /no_think"
    config.data.train = config.data.test = os.path.join(
        os.environ.get("RLJAX_DATA", "../shared/data"), "datasets/gsm8k"
    )
    config.data.columns = {"prompt": "question", "answer": "answer"}
    config.data.dev_rows = 256
    config.data.prompt_lengths = (256,)  # the longest of the 7,473 has 244 tokens
    config.reward.names = ("gsm8k",)

    # DAPO's loss (2503.14476): mean over tokens, the clip's upper edge at 1.28, no KL and so no reference in memory.
    # Learning rate 1e-6 as there; warm-up and weight decay are those of verl's recipe for it. Groups of 8 and 512 new
    # tokens are what 16 GiB a chip hold of 256 rows.
    config.algo.kl_coef = 0.0
    config.algo.clip_low = 0.2
    config.algo.clip_high = 0.28
    config.algo.advantage_mean = "group"
    config.algo.advantage_std = "group"
    config.algo.aggregation = "token_mean"
    config.optim.learning_rate = 1e-6
    config.optim.warmup_steps = 10
    config.optim.weight_decay = 0.1
    config.steps = 220  # an epoch
    config.rollout.prompts_per_step = 32
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 512
    config.batch.micro_batch_rows = 4  # one row a data shard

    config.eval.every_steps = 20
    config.eval.prompts_per_batch = 256
    config.checkpoint.every_steps = 20
    config.log.samples_per_step = 3
    return config
