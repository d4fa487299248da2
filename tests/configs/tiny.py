"""The smallest whole run: a warm start of 3 steps, then 6 of GRPO, on sums, with one layer of width 32.

python -m rljax.main --config tests/configs/tiny.py --config.output_dir=/tmp/tiny
"""

from ml_collections import ConfigDict

from rljax.config import default_config
from rljax.data.arithmetic import ALPHABET


def get_config() -> ConfigDict:
    config = default_config("grpo")
    config.name = "tiny"
    config.recipe = ("warm_start", "main")
    config.steps = 6
    config.tokenizer.path = f"characters:{ALPHABET}"
    with config.unlocked():
        config.model.architecture = ConfigDict(
            {
                "model_type": "llama",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 48,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
                "initializer_range": 0.1,
            }
        )
        config.data.options = ConfigDict({"difficulty": 1})
        config.stages = ConfigDict(
            {
                "warm_start": {
                    "algo": {"name": "sft"},
                    "steps": 3,
                    "batch": {"rows": 16, "minibatches": 1},
                    "optim": {"learning_rate": 1e-2},
                }
            }
        )
    config.data.train = config.data.dev = config.data.test = "arithmetic"
    config.data.train_rows, config.data.dev_rows, config.data.test_rows = 48, 8, 8
    config.data.prompt_lengths = (8,)
    config.data.row_length = 32

    config.algo.kl_coef = 0.05
    config.algo.clip_low = 0.2
    config.algo.clip_high = 0.2
    config.algo.advantage_mean = "group"
    config.algo.advantage_std = "batch"
    config.algo.aggregation = "token_mean"
    config.rollout.prompts_per_step = 8
    config.rollout.group_size = 2
    config.rollout.max_new_tokens = 8
    config.batch.minibatches = 2
    config.reward.names = ("tests.tiny:even_share",)
    config.optim.learning_rate = 1e-2

    config.eval.every_steps = 4
    config.eval.prompts_per_batch = 8
    config.checkpoint.every_steps = 2
    config.log.samples_per_step = 3
    config.lock()
    return config
