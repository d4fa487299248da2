"""Instruction following as a reward: strict and loose verdicts over registered constraints (IFEval, arXiv 2311.07911).

A row carries ``instruction_id_list`` and, beside each id, its arguments in ``kwargs``. None among the arguments means
absent, as in data that went through a table with one column for each argument.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rljax.rewards.base import Sample, Score
from rljax.rewards.ifeval_constraints import IFEVAL, Checker
from rljax.rewards.ifeval_constraints_ifbench_custom import IFBENCH_CUSTOM
from rljax.rewards.ifeval_constraints_ifbench_format import IFBENCH_FORMAT
from rljax.rewards.ifeval_constraints_ifbench_words import IFBENCH_WORDS
from rljax.rewards.tags import strip_reasoning

# The 58 of IFBench have not been verified against a reference; the 25 of IFEval have.
IFBENCH: dict[str, Checker] = {**IFBENCH_WORDS, **IFBENCH_FORMAT, **IFBENCH_CUSTOM}
INSTRUCTIONS: dict[str, Checker] = {**IFEVAL, **IFBENCH}

_VALUES: dict[str, Callable[[list[bool]], float]] = {
    "mean": lambda verdicts: sum(verdicts) / len(verdicts),
    "sum": lambda verdicts: float(sum(verdicts)),
    "all": lambda verdicts: float(all(verdicts)),
}


def check_instructions(
    prompt: str, response: str, instruction_id_list: Sequence[str], kwargs: Sequence[Mapping[str, Any]]
) -> list[bool]:
    """Strict verdicts, one for each instruction: the response as it stands follows it. An empty response follows none.

    Raises ValueError, naming the prompt, for an unknown instruction id or arguments that do not fit it.
    """
    checks = _bind(prompt, instruction_id_list, kwargs)
    return [_follows(check, response) for check in checks]


def check_instructions_loose(
    prompt: str, response: str, instruction_id_list: Sequence[str], kwargs: Sequence[Mapping[str, Any]]
) -> list[bool]:
    """Loose verdicts, one for each instruction: any of the eight ``loose_variants`` of the response follows it."""
    checks = _bind(prompt, instruction_id_list, kwargs)
    variants = loose_variants(response)
    return [any(_follows(check, variant) for variant in variants) for check in checks]


def loose_variants(response: str) -> list[str]:
    """The response without its first line, its last line, both, neither; each with and without its stars."""
    lines = response.split("\n")
    kept = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return list(dict.fromkeys([*kept, *(variant.replace("*", "") for variant in kept)]))


def accuracy(verdicts: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Prompt-level accuracy (all instructions of a prompt followed) and instruction-level accuracy over a data set."""
    flat = [verdict for row in verdicts for verdict in row]
    return sum(map(all, verdicts)) / max(len(verdicts), 1), sum(flat) / max(len(flat), 1)


def ifeval(sample: Sample, *, value: str = "mean", loose: bool = False) -> Score:
    """Score the answer of a sample, reasoning and answer tags stripped, by its row's constraints.

    ``value``: "mean" (the share that is followed; IF-RLVR, arXiv 2507.02833, trains on ten times that), "sum", or "all"
    (1 only if every one is followed). ``loose`` takes the loose verdicts. ``correct`` is the prompt-level verdict;
    ``parts`` has one entry for each instruction id. Raises ValueError for a row without constraints.
    """
    if value not in _VALUES:
        raise ValueError(f"value {value!r} is not known: write one of {', '.join(map(repr, _VALUES))}")
    for column in ("instruction_id_list", "kwargs"):
        if not sample.row.get(column):
            raise ValueError(
                f"the row of prompt {sample.prompt[:60]!r} has no {column!r}: ifeval scores by its constraints"
            )
    check = check_instructions_loose if loose else check_instructions
    ids = sample.row["instruction_id_list"]
    verdicts = check(sample.prompt, strip_reasoning(sample.prompt, sample.completion), ids, sample.row["kwargs"])
    parts = {one: float(all(v for i, v in zip(ids, verdicts, strict=True) if i == one)) for one in dict.fromkeys(ids)}
    return Score(_VALUES[value](verdicts), correct=all(verdicts), parts=parts)


def _follows(check: Callable[[str], bool], response: str) -> bool:
    return bool(response.strip()) and check(response)


def _bind(prompt: str, ids: Sequence[str], kwargs: Sequence[Mapping[str, Any]]) -> list[Callable[[str], bool]]:
    """Each instruction with its arguments: fresh, so that no verdict can depend on an earlier one."""
    if len(ids) != len(kwargs):
        raise ValueError(
            f"prompt {prompt[:60]!r} has {len(ids)} instructions and {len(kwargs)} kwargs: give one for each"
        )
    checks: list[Callable[[str], bool]] = []
    for instruction, arguments in zip(ids, kwargs, strict=True):
        if instruction not in INSTRUCTIONS:
            near = difflib.get_close_matches(instruction, INSTRUCTIONS, n=1, cutoff=0)[0]
            raise ValueError(
                f"prompt {prompt[:60]!r}: instruction {instruction!r} is not known; did you mean {near!r}?"
            )
        checker = INSTRUCTIONS[instruction]
        given = {key: _number(argument) for key, argument in arguments.items() if argument is not None}
        try:
            inspect.signature(checker).bind("", **given)
        except TypeError as error:
            raise ValueError(f"prompt {prompt[:60]!r}: the kwargs of {instruction!r} do not fit it: {error}") from error
        checks.append(functools.partial(checker, **given))
    return checks


def _number(argument: Any) -> Any:
    """A count that a table stored as 5.0 is 5."""
    return int(argument) if isinstance(argument, float) and argument.is_integer() else argument
