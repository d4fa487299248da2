"""Algorithms. To add one: a file like sft.py, a line here, a config, a hand-number test."""

from rljax.algos import aot, bco, collect, cpo, dpo, grpo, kto, orpo, prefix_reward_model, reward_model, sft, simpo
from rljax.algos.base import Algorithm, Batch

ALGOS = {
    "aot": aot,
    "bco": bco,
    "collect": collect,
    "cpo": cpo,
    "dpo": dpo,
    "grpo": grpo,
    "kto": kto,
    "orpo": orpo,
    "prefix_reward_model": prefix_reward_model,
    "reward_model": reward_model,
    "sft": sft,
    "simpo": simpo,
}

__all__ = ["ALGOS", "Algorithm", "Batch"]
