"""A generated reasoning task: sums with worked steps, ``17+25-8=`` -> ``17+25=42;42-8=34;#34``."""

import re
from typing import Any

import numpy as np

from rljax.data.splits import SPLITS, split_of

ALPHABET = "0123456789+-=;#"

GIVE_UP_AFTER = 20_000  # draws in a row that give no new problem of the split

# difficulty -> (fewest operands, most operands, largest operand)
DIFFICULTIES = {1: (2, 3, 9), 2: (2, 4, 20), 3: (3, 4, 50), 4: (3, 5, 99)}


def problem_key(terms: list[int]) -> str:
    """What makes two problems one: the same terms in another order are in the same split."""
    return "arithmetic:" + ",".join(map(str, sorted(terms)))


def worked_solution(terms: list[int]) -> str:
    """``[17, 25, -8]`` -> ``17+25=42;42-8=34;#34``."""
    total = terms[0]
    steps = []
    for term in terms[1:]:
        steps.append(f"{total}{term:+d}={total + term};")
        total += term
    return "".join(steps) + f"#{total}"


def make_rows(
    *,
    split: str,
    count: int = 1000,
    seed: int = 0,
    difficulty: int = 2,
    bounds: tuple[int, int, int] | None = None,
    guess_share: float = 0.0,
) -> list[dict[str, Any]]:
    """``count`` different problems of one split; no running total is negative.

    Rows have ``prompt``, ``answer`` (the number as text), ``solution`` (worked text that ends in ``#answer``) and
    ``dataset``. ``bounds`` (fewest operands, most operands, largest operand) goes before ``difficulty``. Splits share
    no problem, whatever the seeds, counts and difficulties. A ``guess_share`` of the solutions, at random,
    states a guess within 2 of the answer and no steps: text of mixed quality, from which a model learns both habits and
    not which one pays. Raises ValueError when a split has too few problems.
    """
    if split not in SPLITS:
        raise ValueError(f"arithmetic has no split {split!r}; it has {', '.join(SPLITS)}")
    if bounds is None and difficulty not in DIFFICULTIES:
        raise ValueError(f"arithmetic has no difficulty {difficulty}; it has {', '.join(map(str, DIFFICULTIES))}")
    fewest, most, largest = DIFFICULTIES[difficulty] if bounds is None else _checked(bounds)
    rng = np.random.default_rng(seed)
    rows: dict[str, dict[str, Any]] = {}
    misses = 0
    while len(rows) < count:
        terms = _draw_terms(rng, int(rng.integers(fewest, most + 1)), largest)
        prompt = f"{terms[0]}" + "".join(f"{term:+d}" for term in terms[1:]) + "="
        if prompt in rows or split_of(problem_key(terms)) != split:
            misses += 1
            if misses > GIVE_UP_AFTER:
                raise ValueError(
                    f"arithmetic found only {len(rows)} different problems of {count} in split {split!r}; "
                    "ask for fewer or for a higher difficulty"
                )
            continue
        misses = 0
        solution = worked_solution(terms)
        answer = solution[solution.index("#") + 1 :]
        if guess_share and rng.random() < guess_share:
            solution = f"#{max(0, int(answer) + int(rng.integers(-2, 3)))}"
        rows[prompt] = {"prompt": prompt, "answer": answer, "solution": solution, "dataset": "arithmetic"}
    return list(rows.values())


def _checked(bounds: Any) -> tuple[int, int, int]:
    whole = isinstance(bounds, list | tuple) and all(isinstance(bound, int) for bound in bounds)
    if not whole or len(bounds) != 3 or not 1 <= bounds[0] <= bounds[1] or bounds[2] < 1:
        raise ValueError(
            f"arithmetic's bounds are {bounds!r}; give the fewest operands, the most and the largest, such as 2,4,9"
        )
    fewest, most, largest = bounds
    return fewest, most, largest


def make_pairs(*, split: str, count: int = 1000, seed: int = 0, difficulty: int = 2) -> list[dict[str, Any]]:
    """Problems with a right solution and one that its verifier calls wrong: ``prompt, chosen, rejected``.

    The wrong one makes a mistake of 1 to 3 in one of its steps and goes on from there, so both are equally worked out.
    """
    rng = np.random.default_rng([seed, 1])
    rows = make_rows(split=split, count=count, seed=seed, difficulty=difficulty)
    wrong = [_with_mistake(row["prompt"], rng) for row in rows]
    return [
        {"prompt": row["prompt"], "chosen": row["solution"], "rejected": text, "answer": row["answer"]}
        for row, text in zip(rows, wrong, strict=True)
    ]


def _with_mistake(prompt: str, rng: np.random.Generator) -> str:
    terms = [int(term) for term in re.findall(r"-?\d+", prompt)]
    at, slip = int(rng.integers(1, len(terms))), int(rng.integers(1, 4))
    total, steps = terms[0], []
    for place, term in enumerate(terms[1:], start=1):
        before, total = total, total + term
        if place == at:
            total += slip if total < slip or rng.random() < 0.5 else -slip
        steps.append(f"{before}{term:+d}={total};")
    return "".join(steps) + f"#{total}"


def make_comparisons(
    *, split: str, count: int = 1000, seed: int = 0, difficulty: int = 2, bounds: tuple[int, int, int] | None = None
) -> list[dict[str, Any]]:
    """The problems of ``make_rows`` with two answers each: worked out, and a wrong guess 1 or 2 beside the result.

    Rows have ``prompt, chosen, rejected`` and ``chosen_score, rejected_score``: 1 for the right one, and for the wrong
    one 1 less how far it is off, 0 or -1.
    """
    rng = np.random.default_rng([seed, 1])
    rows = []
    for row in make_rows(split=split, count=count, seed=seed, difficulty=difficulty, bounds=bounds):
        answer = int(row["answer"])
        wrong = answer + int(rng.integers(1, 3)) * (1 if answer < 2 or rng.random() < 0.5 else -1)
        scores = {"chosen_score": 1.0, "rejected_score": 1.0 - abs(wrong - answer)}
        rows.append({**row, "chosen": row["solution"], "rejected": f"#{wrong}", **scores})
    return rows


def _draw_terms(rng: np.random.Generator, operands: int, largest: int) -> list[int]:
    """Signed terms, the first positive, no running total below 0 and no term 0."""
    terms = [int(rng.integers(1, largest + 1))]
    total = terms[0]
    for _ in range(operands - 1):
        term = int(rng.integers(1, largest + 1))
        if rng.random() < 0.5 and term <= total:
            term = -term
        terms.append(term)
        total += term
    return terms
