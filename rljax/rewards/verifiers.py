"""One reward for mixed data: each row names its own verifiers."""

from collections.abc import Callable
from typing import Any

from rljax.rewards.base import Sample, Score, as_reward, weighted_sum
from rljax.rewards.countdown import countdown
from rljax.rewards.ifeval import ifeval
from rljax.rewards.math import arithmetic, gsm8k, math_answer
from rljax.rewards.registry import look_up
from rljax.rewards.tags import strip_reasoning
from rljax.rewards.text import story

# By the name of the data set, as in ``row["dataset"]``.
VERIFIERS: dict[str, Callable[..., Any]] = {
    "gsm8k": gsm8k,
    "svamp": gsm8k,
    "math": math_answer,
    "math500": math_answer,
    "aime24": math_answer,
    "amc23": math_answer,
    "arithmetic": arithmetic,
    "countdown": countdown,
    "stories": story,
    "ifeval": ifeval,
    "ifbench": ifeval,
}


def verify(sample: Sample) -> Score:
    """The weighted sum of the verifiers that ``row["dataset"]`` names, on the text without its thoughts.

    ``row["dataset"]`` is one name or a list; ``row["weight"]``, 1 by default, a number for all or a list with one each.
    Every verifier reads its own columns of the row. Right if all that judge say so; parts are by data set. Raises
    ValueError for a name it does not know and for another number of weights.
    """
    if "dataset" not in sample.row:
        raise ValueError("verify needs the column 'dataset', which names a row's verifiers")
    names = sample.row["dataset"]
    names = [names] if isinstance(names, str) else list(names)
    weights = sample.row.get("weight", 1.0)
    weights = list(weights) if isinstance(weights, (list, tuple)) else [float(weights)] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"a row names {len(names)} verifiers ({', '.join(names)}) and {len(weights)} weights")
    text = strip_reasoning(sample.prompt, sample.completion)
    judged = sample._replace(completion=text)
    scores = [as_reward(look_up(name, VERIFIERS, "verifier"))([judged])[0] for name in names]
    total = weighted_sum(names, weights, scores)
    return total if text == sample.completion else total._replace(spans=())  # spans would count other characters
