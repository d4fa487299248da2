"""Algorithms. To add one: a file like sft.py, a line here, a config, and a test against hand-computed numbers."""

from rljax.algos import (
    aot,
    bco,
    collect,
    cpo,
    distillation,
    dpo,
    grpo,
    kto,
    nash_md,
    online_dpo,
    orpo,
    ppo,
    ppo_max,
    prefix_reward_model,
    reinforce,
    reward_model,
    rloo,
    rto,
    sft,
    simpo,
    vtrace,
    xpo,
)
from rljax.algos.base import Algorithm, Batch

ALGOS = {
    "aot": aot,
    "bco": bco,
    "collect": collect,
    "cpo": cpo,
    "distillation": distillation,
    "dpo": dpo,
    "grpo": grpo,
    "kto": kto,
    "nash_md": nash_md,
    "online_dpo": online_dpo,
    "orpo": orpo,
    "ppo": ppo,
    "ppo_max": ppo_max,
    "prefix_reward_model": prefix_reward_model,
    "reinforce": reinforce,
    "reward_model": reward_model,
    "rloo": rloo,
    "rto": rto,
    "sft": sft,
    "simpo": simpo,
    "vtrace": vtrace,
    "xpo": xpo,
}

__all__ = ["ALGOS", "Algorithm", "Batch"]
