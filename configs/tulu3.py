"""Tülu 3 (2411.15124): SFT, length-normalised DPO, then RL with verifiable rewards by PPO; 3.1 does it by GRPO.

    python -m rljax.main --config configs/tulu3.py:sft          then :dpo, then
    python -m rljax.main --config configs/tulu3.py              reward model (for the critic) and PPO
    python -m rljax.main --config configs/tulu3.py:grpo         Tülu 3.1
    ... --config.model.path=runs/tulu3_sft/model                each starts from the authors' model unless told

8B; 70B's values stand beside them and are variants ``sft_70b``, ``dpo_70b`` and ``ppo_70b``. Hardware: a pod. Not
measured here. Expected (8B, the authors'): GSM8K 84.3 to 87.6, MATH 42.0 to 43.7, IFEval 81.1 to 82.4 from DPO to RLVR.
"""

from ml_collections import ConfigDict

from rljax.config import default_config

SFT_ROWS = 939_343  # of the mixture's card
PAIRS = 271_409  # of the 8B preference mixture's card
RLVR_PROMPTS = 29_946  # 7,473 GSM8K + 7,500 MATH + 14,973 IF


def tulu3(algo: str, model: str) -> ConfigDict:
    """What its stages share."""
    config = default_config(algo)
    config.model.path = model
    config.model.remat = "block"
    config.compute_dtype = "bfloat16"
    config.tokenizer.template = "chat"
    config.mesh = "1,-1,4"
    config.checkpoint.every_steps = 100
    return config


def sft() -> ConfigDict:
    config = tulu3("sft", "meta-llama/Llama-3.1-8B")
    config.name = "tulu3_sft"
    config.data.train = "allenai/tulu-3-sft-mixture"
    config.data.row_length = 4096
    config.batch.rows = 128
    config.batch.micro_batch_rows = 32
    config.steps = 2 * SFT_ROWS // 128  # 2 epochs
    # The authors sum over tokens without a denominator, and their rate is tuned to that: the mean over a step's tokens
    # is the same direction, free of the scale.
    config.optim.learning_rate = 5e-6
    config.optim.schedule = "linear"
    config.optim.warmup_fraction = 0.03
    return config


PREFERENCES = {"train": "allenai/llama-3.1-tulu-3-8b-preference-mixture", "row_length": 2048, "bad_rows": "drop"}


def dpo() -> ConfigDict:
    config = tulu3("dpo", "allenai/Llama-3.1-Tulu-3-8B-SFT")
    config.name = "tulu3_dpo"
    config.data.update(PREFERENCES)
    config.algo.average = True  # every sum of log-probs over its length
    config.algo.beta = 5.0
    config.batch.rows = 128
    config.batch.micro_batch_rows = 64
    config.steps = PAIRS // 128  # 1 epoch
    config.optim.learning_rate = 5e-7
    config.optim.schedule = "linear"
    config.optim.warmup_fraction = 0.1
    return config


def rlvr(algo: str) -> ConfigDict:
    """Verifiable rewards: 10 for a verified answer, else 0."""
    config = tulu3(algo, "allenai/Llama-3.1-Tulu-3-8B-DPO")
    config.data.train = "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints"
    config.data.prompt_lengths = (1024, 2048)
    config.data.columns = {"prompt": "messages", "answer": "ground_truth"}
    config.reward.names = ("verify",)
    config.reward.weights = (10.0,)
    config.rollout.max_new_tokens = 2048
    config.rollout.temperature = 1.0
    config.algo.clip_low = config.algo.clip_high = 0.2
    return config


REWARD_MODEL = {
    "algo": {"name": "reward_model", "loss": "bradley_terry"},  # the head's std is 1/sqrt(d + 1), as everywhere here
    "steps": PAIRS // 256,  # 1 epoch
    "critic": {"init_from": "policy"},
    "data": {**PREFERENCES, "columns": {}},
    "batch": {"rows": 256, "epochs": 1, "micro_batch_rows": 64},
    "optim": {"learning_rate": 3e-6, "schedule": "linear"},
}


def ppo() -> ConfigDict:
    config = rlvr("ppo")
    config.name = "tulu3_ppo"
    config.recipe = ("reward_model", "main")
    with config.unlocked():
        config.stages.reward_model = ConfigDict(REWARD_MODEL)
    config.init_from = "base"
    config.critic.init_from = "reward_model"  # better than from the policy; adding its scores to the reward hurts
    config.algo.update(
        {
            "missing_end": "replace",
            "missing_end_value": -10.0,
            "kl_coef": 0.05,
            "value_clip": 0.2,
            "value_coef": 0.1,
            "gamma": 1.0,
            "lam": 0.95,
            "whiten_advantages": "rollout",
            "aggregation": "token_mean",
        }
    )
    config.rollout.prompts_per_step = 224
    config.rollout.group_size = 1
    config.batch.epochs = 4
    config.batch.minibatches = 1
    config.batch.micro_batch_rows = 32
    config.steps = RLVR_PROMPTS // 224  # once over the prompts
    for optim in (config.optim, config.critic.optim):
        optim.learning_rate = 3e-7
        optim.schedule = "linear"
    return config


def grpo() -> ConfigDict:
    config = rlvr("grpo")
    config.name = "tulu3p1_grpo"
    config.algo.kl_coef = 0.01  # of k3; no penalty for a missing end
    config.algo.advantage_mean = config.algo.advantage_std = "group"
    config.algo.aggregation = "token_mean"
    config.rollout.prompts_per_step = 48
    config.rollout.group_size = 16
    config.batch.micro_batch_rows = 64
    config.steps = RLVR_PROMPTS // 48
    config.optim.learning_rate = 5e-7
    config.optim.schedule = "constant"
    return config


def of_70b(config: ConfigDict, learning_rate: float) -> ConfigDict:
    """The same stage at 70B, at its own rate."""
    config.name = f"{config.name}_70b"
    config.model.path = config.model.path.replace("8B", "70B")
    config.data.train = config.data.train.replace("8b", "70b")
    config.optim.learning_rate = config.critic.optim.learning_rate = learning_rate
    return config


def sft_70b() -> ConfigDict:
    return of_70b(sft(), 2e-6)


def dpo_70b() -> ConfigDict:
    return of_70b(dpo(), 2e-7)


def ppo_70b() -> ConfigDict:
    config = of_70b(ppo(), 1e-7)
    config.algo.kl_coef = 0.07
    config.rollout.prompts_per_step = 640
    config.steps = RLVR_PROMPTS // 640
    return config


get_config = ppo
VARIANTS = {
    "sft": sft,
    "dpo": dpo,
    "ppo": ppo,
    "grpo": grpo,
    "sft_70b": sft_70b,
    "dpo_70b": dpo_70b,
    "ppo_70b": ppo_70b,
}
