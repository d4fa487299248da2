"""Rewards for the sentences of a completion, from a teacher's file (ARES, arXiv 2407.00087)."""

import json
import re
from pathlib import Path

from rljax.rewards.base import Sample, Score, Span

# A sentence ends at . ! ? before white space, or at a line break.
_END = re.compile(r"(?<=[.!?])\s+|\n+")


def sentences(text: str) -> list[tuple[int, int]]:
    """Where each sentence starts and ends in ``text``; white space between them belongs to none."""
    places, start = [], 0
    for gap in [*_END.finditer(text), None]:
        end = gap.start() if gap else len(text)
        if text[start:end].strip():
            places.append((start, end))
        start = gap.end() if gap else end
    return places


class SentenceFeedback:
    """A teacher's score in [0, 1] for every sentence, minus .5, at that sentence; the value itself is 0.

    ``path`` is a JSONL file with ``prompt``, ``completion`` and ``scores``. A completion that has no line there, or
    another number of sentences than scores, raises ValueError: with ``reward.discard_failed`` it trains nothing.
    """

    def __init__(self, path: str):
        lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        self._scores = {(line["prompt"], line["completion"]): line["scores"] for line in lines}
        self._path = path

    def __call__(self, sample: Sample) -> Score:
        scores = self._scores.get((sample.row.get("prompt", sample.prompt), sample.completion))
        if scores is None:
            raise ValueError(f"{self._path} has no scores for this completion of {sample.prompt[:40]!r}")
        places = sentences(sample.completion)
        if len(places) != len(scores):
            raise ValueError(f"{len(scores)} scores for the {len(places)} sentences of a completion")
        spans = [Span(start, end, score - 0.5) for (start, end), score in zip(places, scores, strict=True)]
        return Score(0.0, spans=tuple(spans), parts={"sentences": sum(span.value for span in spans)})
