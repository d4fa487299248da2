"""RTO (2404.18922): DPO, then PPO whose token rewards are the DPO policy's log-ratio. Values of the authors' code.

    python -m rljax.main --config configs/rto.py

Hardware: not measured here. Expected (the authors', AlpacaEval 2 LC / WR): SFT 13.22 / 8.58, DPO 17.40 / 12.23, PPO
19.47 / 12.89, RTO 27.00 / 22.45.
"""

from ml_collections import ConfigDict

from rljax.config import default_config

PAIRS = 61_135  # of UltraFeedback binarized's card

# Not in the paper's text: values of Zephyr's handbook.
DPO = {
    "algo": {"name": "dpo", "beta": 0.1},
    "steps": PAIRS // 128,
    "batch": {"rows": 128, "micro_batch_rows": 32, "minibatches": 1},
    "optim": {"learning_rate": 5e-7, "schedule": "linear", "warmup_fraction": 0.1},
}
REWARD_MODEL = {
    "algo": {"name": "reward_model", "loss": "bradley_terry"},
    "steps": PAIRS // 128,
    "critic": {"init_from": "policy"},
    "batch": {"rows": 128, "micro_batch_rows": 32, "minibatches": 1},
    "optim": {"learning_rate": 5e-6, "schedule": "cosine", "warmup_fraction": 0.03},
}


def get_config() -> ConfigDict:
    config = default_config("rto")
    config.name = "rto"
    config.recipe = ("dpo", "reward_model", "main")
    config.model.path = "OpenRLHF/Llama-3-8b-sft-mixture"
    config.model.remat = "block"
    config.compute_dtype = "bfloat16"
    config.tokenizer.template = "chat"
    config.mesh = "1,-1,4"
    config.data.train = "HuggingFaceH4/ultrafeedback_binarized"
    config.data.options = {"split": "train_prefs"}
    config.data.bad_rows = "drop"
    config.data.row_length = 2048
    config.data.prompt_lengths = (1024,)
    with config.unlocked():
        config.stages = ConfigDict({"dpo": DPO, "reward_model": {**REWARD_MODEL, "init_from": "base"}})
    config.init_from = "base"  # the SFT model is policy, and reference in both terms
    config.guide_from = "dpo"
    config.critic.init_from = config.reward_model_from = "reward_model"
    config.algo.update(
        {
            "guide_coef": 0.05,  # β1, with DPO's β in it
            "guide_clamp": 0.05,
            "kl_coef": 0.01,  # β2, k1
            "reward_clip": 10.0,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "value_clip": 0.2,
            "value_coef": 0.5,
            "gamma": 1.0,
            "lam": 0.95,
            "whiten_advantages": "rollout",
            "aggregation": "token_mean",
        }
    )
    config.rollout.prompts_per_step = 1024
    config.rollout.group_size = 1
    config.rollout.max_new_tokens = 1024
    config.batch.minibatches = 8  # of 128
    config.batch.micro_batch_rows = 32
    config.steps = PAIRS // 1024
    config.optim.learning_rate = 5e-7
    config.critic.optim.learning_rate = 9e-6
    config.checkpoint.every_steps = 20
    return config
