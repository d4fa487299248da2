"""The TL;DR reproduction (2403.17031): SFT, reward model, PPO on Reddit posts, at 1B. Its 25 details are settings.

    python -m rljax.data.tldr --input RAW.jsonl --output tldr/train.jsonl     posts to prompts (details 1 to 4)
    python -m rljax.main --config configs/tldr.py --config.data.train=tldr/train.jsonl

Waits for Pythia's family (``gpt_neox``); any other model runs it: ``--config.model.path=...``.
tests/test_tldr_details.py has a test for each detail. Not measured here. Expected (the authors'): reward-model accuracy
.628 / .669 / .689 at 1B / 2.8B / 6.9B; 6.9B wins about 80 % against the references; 1B over-optimises.
"""

from ml_collections import ConfigDict

from rljax.config import default_config

SUMMARIES = 116_722  # detail 9
PAIRS = 92_858  # detail 10
EPISODES = 1_000_000  # detail 20

ADAM = {"eps": 1e-5, "learning_rate": 3e-6, "schedule": "cosine"}  # details 9 and 10


def get_config() -> ConfigDict:
    config = default_config("ppo")
    config.name = "tldr_1b"
    config.recipe = ("sft", "reward_model", "main")
    config.model.path = "EleutherAI/pythia-1b-deduped"
    config.model.remat = "block"
    config.compute_dtype = "bfloat16"  # detail 8
    config.data.train = "tldr/train.jsonl"
    config.data.prompt_lengths = (512,)  # details 2 and 5: left-padded
    with config.unlocked():
        config.stages = ConfigDict(
            {
                "sft": {
                    "algo": {"name": "sft"},
                    "init_from": "base",
                    "steps": SUMMARIES // 128,  # 1 epoch
                    "data": {"row_length": 562},  # detail 5
                    "batch": {"rows": 128, "epochs": 1},
                    "optim": dict(ADAM),
                },
                "reward_model": {
                    "algo": {"name": "reward_model", "loss": "bradley_terry"},
                    "init_from": "sft",
                    "steps": PAIRS // 64,  # 1 epoch
                    "data": {"train": "tldr/comparisons.jsonl", "row_length": 638},
                    "batch": {"rows": 64, "epochs": 1},
                    "critic": {"init_from": "policy", "center_on": "tldr/references.jsonl"},  # details 11 and 15
                    "optim": dict(ADAM),
                },
            }
        )
    config.init_from = "sft"  # detail 22
    config.critic.init_from = "reward_model"
    config.reward_model_from = "reward_model"
    config.algo.update(
        {
            "missing_end": "replace",  # detail 23: the EOS trick
            "missing_end_value": -1.0,
            "kl_coef": 0.05,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "value_clip": 0.2,
            "value_coef": 0.1,
            "gamma": 1.0,
            "lam": 0.95,
            "whiten_rewards": False,  # detail 24, an option
            "whiten_advantages": "rollout",  # detail 25
            "aggregation": "token_mean",
        }
    )
    config.rollout.prompts_per_step = 512
    config.rollout.group_size = 1
    config.rollout.max_new_tokens = 53  # detail 4
    config.rollout.temperature = 0.7
    config.batch.epochs = 4
    config.batch.minibatches = 1
    config.batch.micro_batch_rows = 64
    config.steps = EPISODES // 512
    for optim in (config.optim, config.critic.optim):
        optim.learning_rate = 3e-6
        optim.schedule = "linear"
        optim.eps = 1e-5
    config.eval.temperature = 0.01
    config.checkpoint.every_steps = 100
    return config
