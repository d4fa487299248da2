"""ARES (2407.00087): RL on a teacher's scores for sentences, then SFT on rationales that it corrected, in turns.

    python -m rljax.main --config configs/ares.py \\
        --config.reward.names=my_teacher:feedback --config.stages.corrected.data.train=corrected.jsonl

``my_teacher.py`` holds ``feedback = SentenceFeedback("feedback.jsonl")`` (rljax/rewards/sentences.py): a line for each
completion, with a score in [0, 1] for every sentence; the score less .5 is added at that sentence's last token. A
completion whose sentences and scores differ in number is left out. Hardware and results: not measured here.
"""

from ml_collections import ConfigDict

from rljax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("ppo")
    config.name = "ares"
    config.recipe = ("main", "corrected", "again", "corrected_again")
    config.model.path = "Qwen/Qwen2.5-0.5B-Instruct"
    config.tokenizer.template = "chat"
    config.data.train = "questions.jsonl"
    config.data.prompt_lengths = (512,)
    config.reward.names = ("my_teacher:feedback",)
    config.reward.discard_failed = True
    correct = {
        "algo": {"name": "sft"},
        "steps": 500,
        "data": {"train": "corrected.jsonl", "row_length": 1024},
        "batch": {"rows": 32, "minibatches": 1, "epochs": 1, "micro_batch_rows": 0},
        "optim": {"learning_rate": 2e-5},
    }
    with config.unlocked():
        config.stages = ConfigDict({"corrected": dict(correct), "again": {}, "corrected_again": dict(correct)})
    config.algo.update(
        {
            "dense_coef": 1.0,  # the sentences' rewards
            "kl_coef": 1e-4,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "value_loss": "squared",  # unclipped
            "value_clip": 0.2,
            "value_coef": 0.5,
            "gamma": 1.0,
            "lam": 0.95,
            "whiten_advantages": "rollout",  # the base model's setting; the large one has none
            "aggregation": "token_mean",
        }
    )
    config.rollout.prompts_per_step = 32
    config.rollout.group_size = 4
    config.rollout.max_new_tokens = 512
    config.batch.epochs = 1
    config.steps = 1000  # 10 epochs of RL for the base model, 5 for the large one
    for optim in (config.optim, config.critic.optim):
        optim.learning_rate = 2e-5
    config.checkpoint.every_steps = 50
    return config
