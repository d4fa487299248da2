"""The quickstart: a small decoder from random weights learns to add and subtract, first from text, then by GRPO.

    make quickstart        (or: python -m rljax.main --config configs/quickstart.py)

The text is of mixed quality: 40 % of its solutions are worked step by step, the others state a guess within 2 of the
answer. The warm start leaves a model with both habits; GRPO finds out which one pays.

Hardware: 2 CPU cores, no network, about 4 minutes when quiet (LOG.md). Expected: held-out exact match
(``eval/score``, 512 problems that no training row shares) of 0 at the start, about 0.5 after the warm start, above 0.9
after GRPO.
"""

from ml_collections import ConfigDict

from rljax.config import default_config
from rljax.data.arithmetic import ALPHABET


def get_config() -> ConfigDict:
    config = default_config("grpo")
    config.name = "quickstart"
    config.cpu_devices = 2
    config.mesh = "-1,1,1"  # a core decodes its half of the prompts: half the time of a rollout on one device
    config.recipe = ("warm_start", "main")
    config.tokenizer.path = f"characters:{ALPHABET}"
    with config.unlocked():
        config.model.architecture = ConfigDict(
            {
                "model_type": "llama",
                "hidden_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 24,
                "intermediate_size": 288,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "max_position_embeddings": 256,
                "tie_word_embeddings": True,
                "initializer_range": 0.05,
            }
        )
        config.data.options = ConfigDict({"bounds": (2, 4, 9), "guess_share": 0.6})
        config.stages = ConfigDict(
            {
                "warm_start": {
                    "algo": {"name": "sft"},
                    "steps": 900,
                    "data": {"train_rows": 4096},
                    "batch": {"rows": 64, "micro_batch_rows": 16},
                    "optim": {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 10},
                }
            }
        )
    config.data.train = config.data.dev = config.data.test = "arithmetic"
    config.data.train_rows = 8192
    config.data.dev_rows = 128
    config.data.test_rows = 512
    config.data.prompt_lengths = (12,)  # BOS, four numbers, three signs, =
    config.data.row_length = 48

    config.algo.kl_coef = 0.001  # to the end of the warm start: small, and it shows how far the policy went
    config.algo.clip_low = 0.2
    config.algo.clip_high = 0.28
    config.algo.advantage_mean = "group"
    config.algo.advantage_std = "group"
    config.algo.aggregation = "sequence_mean_token_mean"
    config.steps = 80
    config.rollout.prompts_per_step = 32
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 32
    config.reward.names = ("arithmetic",)
    config.batch.micro_batch_rows = 32  # packed, and small enough for a CPU's caches
    config.optim.learning_rate = 3e-4
    config.optim.schedule = "linear"
    config.optim.warmup_steps = 5

    config.eval.prompts_per_batch = 256
    config.checkpoint.every_steps = 50
    config.log.samples_per_step = 3
    config.lock()
    return config
