"""Tülu 2.5 (2406.09279): a reward model, then PPO; and the DPO that it is compared with. Values of the authors' code.

    python -m rljax.main --config configs/tulu2p5.py            reward model and PPO, in one run
    python -m rljax.main --config configs/tulu2p5.py:dpo
    ... --dry_run --config.device_memory_gib=95                 checks and the memory plan, on any machine

Hardware: the authors used a v3-256 for 13B, meshes of 64 x 4. Not measured here. Expected (the authors' averages): SFT
56.8, DPO 61.0, PPO 62.2 on UltraFeedback with fine-grained scores, of which 60,908 pairs are used.
"""

from ml_collections import ConfigDict

from rljax.config import default_config

PAIRS = 60_908  # "DPO/PPO on 60,908 samples"


def tulu2(algo: str) -> ConfigDict:
    """What its stages share."""
    config = default_config(algo)
    config.model.path = "allenai/tulu-2-13b"
    config.model.remat = "block"
    config.compute_dtype = "bfloat16"
    config.tokenizer.template = "chat"
    config.mesh = "1,-1,4"
    config.data.train = "allenai/tulu-2.5-preference-data"
    config.data.options = {"split": "ultrafeedback_mean_aspects"}
    config.optim.b2 = 0.95  # AdamW .9/.95, clip 1 by the global norm, no decay
    config.optim.clip_norm = 1.0
    config.optim.weight_decay = 0.0
    config.batch.micro_batch_rows = 64
    config.checkpoint.every_steps = 50
    return config


def dpo() -> ConfigDict:
    config = tulu2("dpo")
    config.name = "tulu2p5_dpo"
    config.algo.beta = 0.1
    config.data.row_length = 4096
    config.batch.rows = 32  # 8 x 4
    config.steps = 3 * PAIRS // 32  # 3 epochs
    config.optim.learning_rate = 5e-7
    config.optim.schedule = "linear"
    config.optim.warmup_fraction = 0.1
    return config


REWARD_MODEL = {
    "algo": {"name": "reward_model", "loss": "bradley_terry"},
    "steps": PAIRS // 512,  # 1 epoch
    "init_from": "base",
    "critic": {"init_from": "policy"},
    "data": {"row_length": 4096, "prompt_lengths": (4096,)},
    "batch": {"rows": 512, "minibatches": 1},  # 32 x 16
    "optim": {
        "learning_rate": 1e-5,
        "schedule": "linear",
        "final_learning_rate": 1e-6,
        "warmup_fraction": 0.03,
    },
}


def get_config() -> ConfigDict:
    config = tulu2("ppo")
    config.name = "tulu2p5_ppo"
    config.recipe = ("reward_model", "main")
    with config.unlocked():
        config.stages.reward_model = ConfigDict(REWARD_MODEL)
    config.init_from = "base"
    config.reward_model_from = "reward_model"
    config.critic.init_from = "reward_model"  # head included, the same score at every position
    config.algo.update(
        {
            "missing_end": "replace",
            "missing_end_value": -10.0,  # where the last token is no end token
            "kl_coef": 0.05,  # .0325 for larger reward models
            "clip_low": 0.2,
            "clip_high": 0.2,
            "value_clip": 0.2,
            "value_coef": 0.1,
            "gamma": 1.0,
            "lam": 0.95,
            "whiten_advantages": "minibatch",
            "aggregation": "token_mean",
        }
    )
    config.steps = PAIRS // 512
    config.rollout.prompts_per_step = 512
    config.rollout.group_size = 1
    config.rollout.temperature = 0.7
    config.rollout.max_new_tokens = 1024
    config.data.prompt_lengths = (1024,)
    config.batch.minibatches = 8  # of 64
    config.batch.epochs = 1
    for optim in (config.optim, config.critic.optim):
        optim.learning_rate = 1e-6
        optim.schedule = "constant"
        optim.warmup_fraction = 0.1
        optim.b2 = 0.95
    return config


VARIANTS = {"ppo": get_config, "dpo": dpo}
