"""Limits of a config that stop a run which has gone wrong."""

from collections.abc import Mapping

from rljax.config.fields import LimitConfig

# Limit, the metric it is on, and which values are past it: 1 the larger ones, -1 the smaller ones.
RULES = (
    ("kl_per_completion", "train/kl_per_completion", 1),
    ("max_completion_length", "train/completion_length", 1),
    ("min_completion_length", "train/completion_length", -1),
    ("perplexity", "train/perplexity", 1),
)


def limited(metrics: Mapping[str, float]) -> dict[str, float]:
    """What limits look at in the metrics of a step."""
    return {key: metrics[key] for _, key, _ in RULES if key in metrics}


def passed_limit(limits: LimitConfig, step: int, bad_steps: int, values: Mapping[str, float]) -> str:
    """The limit that ``values``, those of ``step``, are past, with the numbers; "" for none.

    ``bad_steps`` in a row were skipped. The same on every process.
    """
    if limits.bad_steps and bad_steps >= limits.bad_steps:
        return (
            f"{bad_steps} steps in a row had a loss or a gradient that is not finite (config.limits.bad_steps); "
            "lower the learning rate or look at train/grad_norm and train/max_log_ratio before it began"
        )
    for name, key, sign in RULES:
        limit = vars(limits)[name]
        if limit and key in values and sign * values[key] > sign * limit:
            return f"step {step}: {key} is {values[key]:.4g}, past config.limits.{name} {limit:g}"
    return ""
