"""Overlap of evaluation and training data: exact copies, shared 8-grams, and duplicates."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rljax.data.batches import prompt_of
from rljax.data.rows import Row


class Overlap(NamedTuple):
    """Counts of rows, and pairs (evaluation row, training row) to show."""

    evaluation_rows: int
    train_rows: int
    exact: int  # evaluation prompts that are a training prompt, but for case, spaces and sentence marks
    shared_ngrams: int  # evaluation prompts with n words in a row of a training prompt, the exact ones included
    train_duplicates: int  # training rows whose prompt stood before
    evaluation_duplicates: int
    examples: list[tuple[int, int]]

    def __str__(self) -> str:
        return (
            f"of {self.evaluation_rows} prompts {self.exact} are among the {self.train_rows} others and "
            f"{self.shared_ngrams} share 8 words in a row with one of them"
        )


def count_overlap(train: Sequence[Row], evaluation: Sequence[Row]) -> Overlap:
    """Compare the prompts of two sets of rows."""
    return overlap_of(prompt_texts(train), prompt_texts(evaluation))


def overlap_of(
    train_texts: Sequence[str], evaluation_texts: Sequence[str], *, n: int = 8, max_examples: int = 5
) -> Overlap:
    """Compare two sets of ``prompt_texts``; one shorter than ``n`` words can only match as a whole."""
    wholes: dict[str, int] = {}
    ngrams: dict[tuple[str, ...], int] = {}
    asked = {gram for text in evaluation_texts for gram in _ngrams(text, n)}  # few: training texts may be millions
    for number, text in enumerate(train_texts):
        wholes.setdefault(text, number)
        for gram in asked.intersection(_ngrams(text, n)):
            ngrams.setdefault(gram, number)
    exact = shared = 0
    examples: list[tuple[int, int]] = []
    for number, text in enumerate(evaluation_texts):
        match = wholes.get(text)
        exact += match is not None
        if match is None:
            match = next((ngrams[gram] for gram in _ngrams(text, n) if gram in ngrams), None)
        if match is not None:
            shared += 1
            examples.append((number, match))
    return Overlap(
        len(evaluation_texts),
        len(train_texts),
        exact,
        shared,
        duplicates(train_texts),
        duplicates(evaluation_texts),
        examples[:max_examples],
    )


def prompt_texts(rows: Sequence[Row]) -> list[str]:
    """The prompt of every row, as it is compared."""
    return [_normalised(row, number) for number, row in enumerate(rows)]


def _normalised(row: Row, number: int) -> str:
    """A prompt in lower case, without spaces and sentence marks around its words; signs stay, they change a problem.

    Of a conversation to learn from it is what comes before the last answer, of plain text the whole.
    """
    prompt = row["prompt"] if row.get("prompt") is not None else _before_last_answer(row.get("messages") or [])
    prompt = prompt or row.get("text") or prompt_of(row, number)
    text = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
    return " ".join(re.findall(r"\w+|[^\w\s.,;:!?\"'()]", text.lower()))


def _before_last_answer(messages: Sequence[Row]) -> Sequence[Row]:
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def duplicates(texts: Sequence[str]) -> int:
    """Texts that stood before."""
    return sum(count - 1 for count in Counter(texts).values())
