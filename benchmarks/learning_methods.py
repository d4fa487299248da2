"""The rows of the learning table: each method's settings over the common ones."""

from dataclasses import dataclass, field
from typing import Any

PROMPTS, GROUP = 32, 8  # of a rollout
STEPS = 40  # rollouts: every method sees 40 x 256 samples
SFT_STEPS = 900


@dataclass(frozen=True)
class Method:
    """One row of the table: settings over the common ones.

    ``rises`` says what is expected of it: 1, 0 (a control) or -1.
    """

    algo: str
    settings: dict[str, Any] = field(default_factory=dict)  # of the algorithm
    config: dict[str, Any] = field(default_factory=dict)  # flattened keys over the common config; @ is a place
    stages: dict[str, Any] = field(default_factory=dict)  # a recipe of its own, whose last stage is what is trained
    rises: int = 1


GRPO = {
    "kl_coef": 0.0,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "advantage_mean": "group",
    "advantage_std": "batch",
    "aggregation": "token_mean",
}
FOUR_EPOCHS = {"batch.epochs": 4, "batch.minibatches": 1}
ON_PAIRS = {"data.train": "@pairs", "data.train_rows": 0, "steps": 160, "optim.learning_rate": 1e-4}
ON_PAIRS |= {"batch.rows": 32, "batch.micro_batch_rows": 8}
PPO = {
    "kl_coef": 0.0,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "aggregation": "token_mean",
    "gamma": 1.0,
    "lam": 0.95,
    "value_coef": 1.0,
    "value_clip": 0.2,
    "whiten_advantages": "rollout",
}
FROM_REWARD_MODEL = {"critic.init_from": "@reward_model", "critic.optim.learning_rate": 1e-3}


def one_round(rule: dict[str, Any], learn: dict[str, Any], rounds: int = 1) -> dict[str, Any]:
    """Rounds of sampling, each followed by learning from what all of them sampled, from the start."""
    stages: dict[str, Any] = {}
    for number in range(1, rounds + 1):
        sampled = ",".join(f"sample_{earlier}" for earlier in range(1, number + 1))
        stages[f"sample_{number}"] = {
            "algo": {"name": "collect"},
            "steps": STEPS // rounds,
            "data": {"seed": number},
            "batch": {"rows": 0, "micro_batch_rows": 0},
        }
        stages[f"learn_{number}"] = {
            **learn,
            "init_from": "base",
            "data": {"train": f"rollouts:{sampled}", "train_rows": 0},
            "select": rule,
        }
    return stages


METHODS: dict[str, Method] = {
    "grpo": Method(
        "grpo", {**GRPO, "advantage_std": "group", "clip_high": 0.2, "aggregation": "sequence_mean_token_mean"}
    ),
    "lite_ppo": Method("grpo", {**GRPO, "clip_high": 0.2}),
    "dapo": Method(
        "grpo", {**GRPO, "advantage_std": "group"}, {"rollout.keep_groups": "mixed", "rollout.max_rounds": 2}
    ),
    "dr_grpo": Method("grpo", {**GRPO, "advantage_std": "none", "aggregation": "constant_length"}),
    "gspo": Method(
        "grpo",
        {
            **GRPO,
            "surrogate": "gspo",
            "advantage_std": "group",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "aggregation": "sequence_mean_token_mean",
        },
        FOUR_EPOCHS,
    ),
    "grpo, 4 epochs": Method("grpo", GRPO, FOUR_EPOCHS),
    "rloo": Method(
        "rloo",
        {
            "kl_coef": 0.0,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "surrogate": "reinforce",
            "aggregation": "sequence_mean_token_sum",
        },
    ),
    "reinforce++": Method(
        "reinforce",
        {
            "kl_coef": 0.0,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "token_mean",
            "gamma": 1.0,
            "baseline": "group",
            "whiten_advantages": True,
        },
    ),
    "ppo": Method("ppo", PPO, FROM_REWARD_MODEL),
    "ppo, 4 epochs": Method("ppo", PPO, {**FROM_REWARD_MODEL, **FOUR_EPOCHS}),
    "dpo": Method("dpo", {"beta": 0.1}, ON_PAIRS),
    "ipo": Method("dpo", {"beta": 0.1, "loss": "ipo_sum"}, ON_PAIRS),
    "simpo": Method("simpo", {"beta": 2.0, "gamma": 1.0}, ON_PAIRS),
    "orpo": Method("orpo", {"odds_coef": 1.0}, ON_PAIRS),
    "kto": Method(
        "sft",
        stages=one_round(
            {"rule": "verdicts", "distinct": "text"},
            {
                "algo": {"name": "kto", "beta": 0.1},
                "steps": 160,
                "batch": {"rows": 64, "micro_batch_rows": 16},
                "optim": {"learning_rate": 1e-4},
            },
        ),
    ),
    "online dpo": Method(
        "online_dpo",
        {"beta": 0.1},
        {"optim.learning_rate": 1e-4, "batch.epochs": 2, "batch.minibatches": 2, "batch.micro_batch_rows": 16},
    ),
    "expert iteration": Method(
        "sft",
        stages=one_round(
            {"rule": "correct", "distinct": "text"},
            {
                "algo": {"name": "sft"},
                "steps": 150,
                "batch": {"rows": 64, "micro_batch_rows": 16},
                "optim": {"learning_rate": 1e-3, "schedule": "cosine"},
            },
            rounds=2,
        ),
    ),
    "rto": Method("rto", {**PPO, "guide_coef": 0.05, "guide_clamp": 0.05}, {**FROM_REWARD_MODEL, "guide_from": "@dpo"}),
    "permuted rewards": Method("grpo", GRPO, {"reward.permute": True}, rises=0),
    "learning rate 0": Method("grpo", GRPO, {"optim.learning_rate": 0.0, "optim.warmup_steps": 0}, rises=0),
    "negated rewards": Method("grpo", GRPO, {"reward.weights": (-1.0,)}, rises=-1),
}


REWARD_MODEL = Method("reward_model", {"loss": "bradley_terry"}, {**ON_PAIRS, "optim.learning_rate": 3e-4})
