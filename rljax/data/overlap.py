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
            f"of {self.evaluation_rows} evaluation prompts {self.exact} are training prompts and {self.shared_ngrams} "
            f"share 8 words in a row with one; duplicates: {self.train_duplicates} of {self.train_rows} in training, "
            f"{self.evaluation_duplicates} in evaluation"
        )


def count_overlap(train: Sequence[Row], evaluation: Sequence[Row], *, n: int = 8, max_examples: int = 5) -> Overlap:
    """Compare the prompts of two sets of rows; one shorter than ``n`` words can only match as a whole."""
    train_texts = [_normalised(row, number) for number, row in enumerate(train)]
    evaluation_texts = [_normalised(row, number) for number, row in enumerate(evaluation)]
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
        len(evaluation),
        len(train),
        exact,
        shared,
        _duplicates(train_texts),
        _duplicates(evaluation_texts),
        examples[:max_examples],
    )


def count_duplicates(rows: Sequence[Row]) -> int:
    """Rows whose prompt stood before."""
    return _duplicates([_normalised(row, number) for number, row in enumerate(rows)])


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


def _duplicates(texts: Sequence[str]) -> int:
    return sum(count - 1 for count in Counter(texts).values())
