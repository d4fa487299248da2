"""The smallest whole run, as a config for this process and as a command for others."""

import random
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rljax.rewards.base import Score
from tests.configs import tiny

ROOT = Path(__file__).resolve().parent.parent


def tiny_config(**overrides: Any) -> ConfigDict:
    """tests/configs/tiny.py with other values: ``tiny_config(steps=2, **{"algo.kl_coef": 0.0})``."""
    config = tiny.get_config()
    config.update_from_flattened_dict(overrides)
    return config


def tiny_command(**overrides: Any) -> list[str]:
    """The command, to be run in ROOT, that does the same from a shell."""
    settings = [f"--config.{key}={value}" for key, value in overrides.items()]
    return [sys.executable, "-m", "rljax.main", "--config", "tests/configs/tiny.py", *settings]


def even_share(prompt: str, completion: str) -> Score:
    """A reward that random weights get a part of at once: the share of even digits, right from a half on."""
    share = sum(c in "02468" for c in completion) / max(len(completion), 1)
    return Score(share, correct=share >= 0.5)


def any_number(prompt: str, completion: str) -> float:
    """A reward that no two processes, and no two runs, agree about."""
    return random.SystemRandom().random()
