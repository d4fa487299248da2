"""Rewards by name. To add one: a function, and a line here."""

from collections.abc import Callable
from typing import Any

from rljax.rewards.base import Sample, Score, Span, as_reward
from rljax.rewards.countdown import countdown, countdown_subset
from rljax.rewards.ifeval import ifeval
from rljax.rewards.math import arithmetic, gsm8k, gsm8k_steps, math_answer
from rljax.rewards.registry import import_object, look_up, with_options
from rljax.rewards.runner import Failure, RewardRunner, Scored
from rljax.rewards.tags import think_answer_format, think_format
from rljax.rewards.text import finished, length_cost, overlong, real_words, required_words, story, unrepeated
from rljax.rewards.verifiers import VERIFIERS, verify

__all__ = [
    "REWARDS",
    "VERIFIERS",
    "Failure",
    "RewardRunner",
    "Sample",
    "Score",
    "Scored",
    "Span",
    "as_reward",
    "load_reward",
]

REWARDS: dict[str, Callable[..., Any]] = {
    "arithmetic": arithmetic,
    "countdown": countdown,
    "countdown_subset": countdown_subset,
    "finished": finished,
    "gsm8k": gsm8k,
    "gsm8k_steps": gsm8k_steps,
    "ifeval": ifeval,
    "length_cost": length_cost,
    "math": math_answer,
    "overlong": overlong,
    "real_words": real_words,
    "required_words": required_words,
    "story": story,
    "think_answer_format": think_answer_format,
    "think_format": think_format,
    "unrepeated": unrepeated,
    "verify": verify,
}


def load_reward(name: str, **options: Any) -> Any:
    """The reward of that name in ``REWARDS``, or ``package.module:function``, with keyword options bound.

    A class is called with the options and its instance is the reward. Raises ValueError, in one sentence with the
    nearest name, for a name or an option that is not known, and for a form that no reward has.
    """
    reward = import_object(name, "reward") if ":" in name else look_up(name, REWARDS, "reward")
    reward = with_options(reward, options)
    as_reward(reward)
    return reward
