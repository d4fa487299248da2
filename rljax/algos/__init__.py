"""Algorithms. To add one: a file like sft.py, a line here, a config, a hand-number test."""

from rljax.algos import grpo, sft
from rljax.algos.base import Algorithm, Batch

ALGOS = {"grpo": grpo, "sft": sft}

__all__ = ["ALGOS", "Algorithm", "Batch"]
