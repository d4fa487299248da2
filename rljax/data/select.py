"""``select(rollouts) -> rows``: samples of an earlier stage as text, pairs, rankings or prompts for a later one.

A sample is a dict: ``row`` (the row it completes), ``completion``, ``ids``, ``reward``, ``correct`` (None where nobody
judges), ``finished``, ``group``. A completion without its end token is never text to learn.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from rljax.data.batches import prompt_of
from rljax.data.rows import DataError, Row

Distinct = Literal["none", "text", "equations"]
Other = Literal["random", "worst"]

# 3+4=7, 48/2=24: what makes two worked solutions one, whatever the words between.
_NUMBER = r"\d+(?:\.\d+)?"
_EQUATION = re.compile(rf"{_NUMBER}(?:\s*[-+*/x×÷]\s*{_NUMBER})+\s*=\s*-?{_NUMBER}")


def select(
    samples: Sequence[Row],
    *,
    rule: str,
    distinct: Distinct = "none",
    per_prompt: int = 0,
    other: Other = "random",
    labels: Sequence[str] = (),
    gap: str = "",
    gap_threshold: float = 0.0,
    seed: int = 0,
) -> list[Row]:
    """Rows of the kind that ``rule`` makes; the settings are those of ``config.select``.

    Text rows are ``prompt, solution``. Raises DataError where nothing is left.
    """
    kept = [sample for sample in samples if sample["finished"]]
    if rule == "correct":
        kept = [sample for sample in kept if _verdict(sample)]
    kept = without_repetition(kept, distinct)
    if per_prompt:
        kept = _at_most(kept, per_prompt, seed)
    if rule == "pairs":
        rows = best_against(kept, other, seed)
    elif rule == "returns":
        rows = [labelled(_text(sample), labels[int(_verdict(sample))]) for sample in kept]
    else:
        rows = _RULES[rule](kept)
    if gap:
        rows = split_by_gap(rows, gap_threshold, gap)
    if not rows:
        raise DataError(
            f"select.rule {rule!r} leaves no row of {len(samples)} samples ({len(kept)} finished and kept); "
            "sample more, or from a policy that is right more often"
        )
    return rows


def without_repetition(samples: Iterable[Row], kind: Distinct) -> list[Row]:
    """The first of every prompt's samples that are alike."""
    if kind == "none":
        return list(samples)
    form = normal_text if kind == "text" else equations
    return list(
        {(_prompt_key(sample), form(sample["completion"])): sample for sample in reversed(list(samples))}.values()
    )[::-1]


def normal_text(text: str) -> str:
    """Lower case, white space as single blanks."""
    return " ".join(text.lower().split())


def equations(text: str) -> str:
    """A solution's equations in order, without blanks (the reasoning path of 2308.01825); its text if it has none."""
    found = [re.sub(r"\s", "", equation) for equation in _EQUATION.findall(text)]
    return ";".join(found) if found else normal_text(text)


def best_against(samples: Iterable[Row], other: Other, seed: int = 0) -> list[Row]:
    """A pair of each group: its best sample and the worst, or any other one (Zephyr, 2310.16944, section 3.3).

    The other one has a lower reward and another text; a group without one has no pair. Among equals the first is best.
    """
    rows = []
    for name, group in groups(samples).items():
        best = max(group, key=lambda sample: sample["reward"])
        others = [s for s in group if s["reward"] < best["reward"] and s["completion"] != best["completion"]]
        if not others:
            continue
        if other == "worst":
            rejected = min(others, key=lambda sample: sample["reward"])
        else:
            rejected = others[int(_generator(seed, name).integers(len(others)))]
        rows.append(
            {
                **best["row"],
                "prompt": prompt_of(best["row"], 0),
                "chosen": best["completion"],
                "rejected": rejected["completion"],
                "chosen_score": best["reward"],
                "rejected_score": rejected["reward"],
            }
        )
    return rows


def split_by_gap(rows: Sequence[Row], threshold: float, part: str) -> list[Row]:
    """MPO (2403.19443): pairs whose scores differ by more than ``threshold`` are easy, all others difficult."""
    for number, row in enumerate(rows):
        if row.get("chosen_score") is None or row.get("rejected_score") is None:
            raise DataError(f"row {number} has no chosen_score and rejected_score, whose gap select.gap compares")
    easy = [row["chosen_score"] - row["rejected_score"] > threshold for row in rows]
    return [row for row, is_easy in zip(rows, easy, strict=True) if is_easy == (part == "easy")]


def labelled(row: Row, label: str) -> Row:
    """``row`` with ``label`` before its prompt, or before the last turn of a conversation."""
    prompt = prompt_of(row, 0)
    if isinstance(prompt, str):
        return {**row, "prompt": label + prompt}
    *before, last = prompt
    return {**row, "prompt": [*before, {**last, "content": label + last["content"]}]}


def groups(samples: Iterable[Row]) -> dict[str, list[Row]]:
    """Samples by group, in the order of their first."""
    found: dict[str, list[Row]] = {}
    for sample in samples:
        found.setdefault(sample["group"], []).append(sample)
    return found


def prompts_of(rows: Iterable[Row]) -> list[Row]:
    """One row for each prompt: what a stage samples from again."""
    return list({json.dumps(prompt_of(row, 0)): row for row in rows}.values())


def rows_hash(rows: Iterable[Row]) -> str:
    """SHA-256 of the rows in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _text(sample: Row) -> Row:
    return {"prompt": prompt_of(sample["row"], 0), "solution": sample["completion"]}


def _best(samples: list[Row]) -> list[Row]:
    return [_text(max(group, key=lambda sample: sample["reward"])) for group in groups(samples).values()]


def _ranking(samples: list[Row]) -> list[Row]:
    return [
        {
            "prompt": prompt_of(group[0]["row"], 0),
            "completions": [sample["completion"] for sample in group],
            "scores": [sample["reward"] for sample in group],
        }
        for group in groups(samples).values()
        if len({sample["reward"] for sample in group}) > 1  # equal rewards rank nothing
    ]


def _verdicts(samples: list[Row]) -> list[Row]:
    return [{"prompt": prompt_of(s["row"], 0), "completion": s["completion"], "label": _verdict(s)} for s in samples]


_RULES: dict[str, Callable[[list[Row]], list[Row]]] = {
    "correct": lambda samples: [_text(sample) for sample in samples],
    "best": _best,
    "ranking": _ranking,
    "verdicts": _verdicts,
}


def _verdict(sample: Row) -> bool:
    if sample["correct"] is None:
        raise DataError("no reward judges right and wrong, which select.rule asks for; use best, pairs or ranking")
    return bool(sample["correct"])


def _at_most(samples: list[Row], count: int, seed: int) -> list[Row]:
    """``count`` of each prompt's samples, at random."""
    by_prompt: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        by_prompt.setdefault(_prompt_key(sample), []).append(number)
    kept = [_generator(seed, key).permutation(numbers)[:count] for key, numbers in by_prompt.items()]
    return [samples[i] for i in np.sort(np.concatenate(kept))] if kept else []


def _prompt_key(sample: Row) -> str:
    return json.dumps(prompt_of(sample["row"], 0))


def _generator(seed: int, name: Any) -> np.random.Generator:
    """Random numbers of a group, whatever stands beside it."""
    return np.random.default_rng([seed, zlib.crc32(str(name).encode())])
