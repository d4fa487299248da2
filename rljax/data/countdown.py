"""A generated reasoning task: reach a target with given numbers, ``3,25,7>54=`` -> ``25*3=75;...#...``."""

from typing import Any

import numpy as np

from rljax.data.arithmetic import GIVE_UP_AFTER
from rljax.data.splits import SPLITS, split_of

ALPHABET = "0123456789+-*()=;#,>"


def problem_key(numbers: list[int], target: int) -> str:
    """What makes two problems one: the same numbers in another order are in the same split."""
    return "countdown:" + ",".join(map(str, sorted(numbers))) + f">{target}"


def make_rows(
    *, split: str, count: int = 1000, seed: int = 0, operands: int = 3, largest: int = 20, largest_target: int = 99
) -> list[dict[str, Any]]:
    """``count`` different solvable problems of one split.

    Every number is used once, with ``+``, ``-`` and ``*``, and no intermediate value is negative. Rows have
    ``prompt``, ``numbers``, ``target``, ``answer`` (the target as text), ``solution`` (steps, then ``#expression``)
    and ``dataset``. Splits share no problem. Raises ValueError when a split has too few problems.
    """
    if split not in SPLITS:
        raise ValueError(f"countdown has no split {split!r}; it has {', '.join(SPLITS)}")
    rng = np.random.default_rng(seed)
    rows: dict[str, dict[str, Any]] = {}
    misses = 0
    while len(rows) < count:
        numbers = [int(n) for n in rng.integers(1, largest + 1, size=operands)]
        target, solution = _play(rng, numbers)
        prompt = ",".join(map(str, numbers)) + f">{target}="
        right_split = split_of(problem_key(numbers, target)) == split
        if prompt in rows or not 1 <= target <= largest_target or not right_split:
            misses += 1
            if misses > GIVE_UP_AFTER:
                raise ValueError(
                    f"countdown found only {len(rows)} different problems of {count} in split {split!r}; "
                    "ask for fewer or for more operands"
                )
            continue
        misses = 0
        rows[prompt] = {
            "prompt": prompt,
            "numbers": numbers,
            "target": target,
            "answer": str(target),
            "solution": solution,
            "dataset": "countdown",
        }
    return list(rows.values())


def _play(rng: np.random.Generator, numbers: list[int]) -> tuple[int, str]:
    """A random legal game over all numbers: the value it reaches, and its steps with the whole expression."""
    values = [(n, str(n)) for n in numbers]
    steps = []
    while len(values) > 1:
        i, j = (int(k) for k in rng.choice(len(values), size=2, replace=False))
        (a, left), (b, right) = sorted((values[i], values[j]), reverse=True)
        sign = "+-*"[int(rng.integers(3))]
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        steps.append(f"{a}{sign}{b}={value};")
        values = [v for k, v in enumerate(values) if k not in (i, j)]
        values.append((value, f"({left}{sign}{right})"))
    value, expression = values[0]
    return value, "".join(steps) + "#" + (expression[1:-1] if len(numbers) > 1 else expression)
