"""A generated instruction-following task: IFBench's constraints on counts, ``red fox, 3 to 5 words:``."""

import string
from typing import Any

import numpy as np

from rljax.data.splits import SPLITS, split_of

ALPHABET = string.ascii_lowercase + string.digits + " ,:"

_QUALITY_LIST = "big red old sad shy wet odd new hot wild calm dark fast kind loud pale thin warm young brave"
_ANIMAL_LIST = """
    fox cat dog hen cow pig owl bee ant bat rat elk ape eel emu yak bear wolf deer goat frog duck lamb crow swan mole
    seal toad crab moth mouse horse sheep snake tiger zebra camel eagle otter shark
"""
_WORD_LIST = """
    ran sat ate saw hid dug met won fell swam slept sang took found jumped looked the a one its my in on by up at near
    under over with and then but so here now tree hill lake barn moon sun rain nest path stone grass river home friend
"""
QUALITIES, ANIMALS, WORDS = _QUALITY_LIST.split(), _ANIMAL_LIST.split(), _WORD_LIST.split()
LARGEST = {"range": 8, "different": 8, "numbers": 5}  # count that a constraint asks for

GIVE_UP_AFTER = 20_000  # draws in a row that give no new prompt of the split


def make_rows(*, split: str, count: int = 1000, seed: int = 0, ignored_share: float = 0.0) -> list[dict[str, Any]]:
    """``count`` different prompts of one split: a subject, and one of three constraints on a completion's words.

    Rows have ``prompt``, ``solution``, ``dataset`` and what ``ifeval`` scores by: ``instruction_id_list`` and
    ``kwargs``. The constraints are count:word_count_range, count:unique_word_count and count:numbers. An
    ``ignored_share`` of the solutions, at random, pays the constraint no heed: text of mixed quality, from which a
    model learns both habits. Splits share no prompt, whatever the seeds. Raises ValueError when one has too few.
    """
    if split not in SPLITS:
        raise ValueError(f"constraints have no split {split!r}; they have {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    rows: dict[str, dict[str, Any]] = {}
    misses = 0
    while len(rows) < count:
        subject = f"{rng.choice(QUALITIES)} {rng.choice(ANIMALS)}"
        kind = str(rng.choice(list(LARGEST)))
        wanted, instruction, arguments = _draw_constraint(rng, kind)
        prompt = f"{subject}, {wanted}:"
        if prompt in rows or split_of("constraints:" + prompt) != split:
            misses += 1
            if misses > GIVE_UP_AFTER:
                raise ValueError(
                    f"constraints have only {len(rows)} prompts of {count} in split {split!r}; ask for fewer"
                )
            continue
        misses = 0
        heeds = rng.random() >= ignored_share
        rows[prompt] = {
            "prompt": prompt,
            "solution": _following(rng, subject, kind, arguments) if heeds else _text(rng, subject, _any_length(rng)),
            "instruction_id_list": [instruction],
            "kwargs": [arguments],
            "dataset": "constraints",
        }
    return list(rows.values())


def _draw_constraint(rng: np.random.Generator, kind: str) -> tuple[str, str, dict[str, int]]:
    """What the prompt says, the constraint's id and its arguments."""
    largest = LARGEST[kind]
    if kind == "range":
        low = int(rng.integers(3, largest - 1))
        high = low + int(rng.integers(0, 3))
        return f"{low} to {high} words", "count:word_count_range", {"min_words": low, "max_words": high}
    if kind == "different":
        wanted = int(rng.integers(3, largest + 1))
        return f"{wanted} different words", "count:unique_word_count", {"N": wanted}
    wanted = int(rng.integers(1, largest + 1))
    return f"{wanted} numbers", "count:numbers", {"N": wanted}


def _following(rng: np.random.Generator, subject: str, kind: str, arguments: dict[str, int]) -> str:
    if kind == "range":
        return _text(rng, subject, int(rng.integers(arguments["min_words"], arguments["max_words"] + 1)))
    if kind == "different":
        fresh = rng.choice(WORDS, arguments["N"] - 2 + int(rng.integers(0, 2)), replace=False)
        return " ".join([subject, *fresh])
    places = np.arange(arguments["N"] + int(rng.integers(1, 4))) < arguments["N"]
    return " ".join([subject, *(_digit(rng) if digit else str(rng.choice(WORDS)) for digit in rng.permutation(places))])


def _any_length(rng: np.random.Generator) -> int:
    return int(rng.integers(3, 11))


def _text(rng: np.random.Generator, subject: str, length: int) -> str:
    """So many words from the subject on: a number one time in four, the word before it again another time in four."""
    words = subject.split()
    while len(words) < length:
        draw = rng.random()
        words.append(_digit(rng) if draw < 0.25 else words[-1] if draw < 0.5 else str(rng.choice(WORDS)))
    return " ".join(words)


def _digit(rng: np.random.Generator) -> str:
    return str(rng.integers(2, 10))
