"""Preference rows as fixed-shape NumPy batches: pairs, rankings of K answers, and single answers with a label."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rljax.data.batches import DataPosition, Encoded, Kept, as_arrays, draw, encode_row, pad
from rljax.data.rows import DataError, Row
from rljax.data.splits import split_of
from rljax.data.tokenizer import Messages, Tokenizer

Text = str | Messages
# Where the last answer starts in a dialogue stored as one text (the format of hh-rlhf).
ASSISTANT_MARK = "\n\nAssistant:"


class Comparison(NamedTuple):
    """One row in the form that all kinds share: a prompt, its answers, and a score for each."""

    prompt: Text
    completions: list[str]
    scores: list[float]


class PreferenceBatch(NamedTuple):
    """``K`` answers a row stand in consecutive rows of the batch: chosen is ``[0::2]``, rejected ``[1::2]``.

    A row with fewer answers than K repeats its last one, with ``answer_valid`` and ``loss_mask`` False.
    """

    tokens: Int[np.ndarray, "b t"]  # right-padded
    valid: Bool[np.ndarray, "b t"]
    loss_mask: Bool[np.ndarray, "b t"]  # the completion and its end token
    scores: Float[np.ndarray, " b"]  # pairs: 1 and 0; rankings: theirs; labels: 1 or 0
    answer_valid: Bool[np.ndarray, " b"]
    row_id: Int[np.ndarray, " b"]  # number of the row times K, plus which answer: a key for cached log-probs


class PreferenceSource:
    """Rows ``prompt, chosen, rejected``, or ``prompt, completions, scores``, or ``prompt, completion, label``.

    Sides are texts or messages. Without ``prompt``, or with whole conversations as sides, the prompt is what both
    share up to the last assistant turn. A row with an answer longer than ``length`` tokens, prompt and end token
    included, is dropped whole and counted in ``kept``. A row that cannot be used (a side missing, both sides equal,
    two prompts, one answer) is an error that names it, or with ``bad_rows="drop"`` is counted in ``bad``.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        length: int,
        seed: int,
        *,
        shuffle: bool = True,
        bad_rows: Literal["error", "drop"] = "error",
    ):
        self.length, self.seed, self.shuffle, self.pad_id = length, seed, shuffle, tokenizer.pad_id
        self.bad: list[str] = []
        self.rows: list[Row] = []
        self.row_numbers: list[int] = []
        self._comparisons: list[Comparison] = []
        self._encoded: list[list[Encoded]] = []
        longest = dropped = 0
        for number, row in enumerate(rows):
            try:
                comparison = read_comparison(row, number)
            except DataError as error:
                if bad_rows == "error":
                    raise
                self.bad.append(str(error))
                continue
            encode, prompt = tokenizer.render_with_completion, comparison.prompt
            encoded = [as_arrays(encode_row(number, encode, prompt, side)) for side in comparison.completions]
            longest = max(longest, *(len(ids) for ids, _ in encoded))
            if any(len(ids) > length for ids, _ in encoded):
                dropped += 1
                continue
            self.rows.append(row)
            self.row_numbers.append(number)
            self._comparisons.append(comparison)
            self._encoded.append(encoded)
        self.kept = Kept(len(self.rows), dropped, longest, length)
        if not self.rows:
            raise DataError(f"no preference row is left of {len(rows)}: {dropped} too long, {len(self.bad)} unusable")
        self.answers = max(len(comparison.completions) for comparison in self._comparisons)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, position: DataPosition, n: int) -> tuple[list[Row], PreferenceBatch, DataPosition]:
        """The next ``n`` rows and their batch of shape [n * answers, length]."""
        picked, position = draw(position, n, size=len(self), seed=self.seed, shuffle=self.shuffle)
        sequences, masks, scores, answer_valid, row_id = [], [], [], [], []
        for i in picked:
            count = len(self._encoded[i])
            for k in range(self.answers):
                ids, mask = self._encoded[i][min(k, count - 1)]
                sequences.append(ids)
                masks.append(mask & (k < count))
                scores.append(self._comparisons[i].scores[k] if k < count else 0.0)
                answer_valid.append(k < count)
                row_id.append(self.row_numbers[i] * self.answers + k)
        tokens, valid = pad(sequences, self.length, self.pad_id)
        loss_mask, _ = pad(masks, self.length, 0)
        batch = PreferenceBatch(
            tokens,
            valid,
            loss_mask.astype(bool),
            np.asarray(scores, np.float32),
            np.asarray(answer_valid, bool),
            np.asarray(row_id, np.int32),
        )
        return [self.rows[i] for i in picked], batch, position


def rows_of_split(rows: Sequence[Row], split: str) -> list[Row]:
    """The preference rows that belong to a split, decided by the prompt: rows of one prompt stay together."""
    return [
        row for number, row in enumerate(rows) if split_of(f"prompt:{read_comparison_prompt(row, number)}") == split
    ]


def read_comparison(row: Row, number: int) -> Comparison:
    """Any kind of preference row in one form. Raises DataError that names the row."""
    if "completions" in row or "scores" in row:
        completions, scores = list(_side(row, "completions", number)), list(_side(row, "scores", number))
        if len(completions) < 2:
            raise DataError(f"row {number} has {len(completions)} answers to rank; give two or more, or a label")
        if len(completions) != len(scores):
            raise DataError(f"row {number} has {len(completions)} completions but {len(scores)} scores")
    elif "label" in row or "completion" in row:
        completions, scores = [_side(row, "completion", number)], [_side(row, "label", number)]
    else:
        completions, scores = [_side(row, side, number) for side in ("chosen", "rejected")], [1.0, 0.0]
    parts = [_split_side(side, row.get("prompt"), number) for side in completions]
    if any(prompt != parts[0][0] for prompt, _ in parts):
        raise DataError(f"the answers of row {number} continue different prompts; give it a 'prompt' or leave it out")
    texts = [text for _, text in parts]
    if "chosen" in row and texts[0] == texts[1]:
        raise DataError(f"chosen and rejected of row {number} are equal, so it prefers nothing; leave it out")
    return Comparison(parts[0][0], texts, [float(score) for score in scores])


def read_comparison_prompt(row: Row, number: int) -> Text:
    """The prompt alone, also of rows that are unusable otherwise."""
    if row.get("prompt") is not None:
        return row["prompt"]
    side = row["completions"][0] if row.get("completions") else row.get("chosen", row.get("completion"))
    if side is None:
        raise DataError(f"row {number} has no prompt and no answer to take it from; it has {', '.join(row)}")
    return _split_side(side, None, number)[0]


def _side(row: Row, name: str, number: int) -> Any:
    if row.get(name) is None:
        raise DataError(f"row {number} has no {name!r}; it has {', '.join(row)}")
    return row[name]


def _split_side(side: Text, prompt: Text | None, number: int) -> tuple[Text, str]:
    """A side as (prompt, completion)."""
    if isinstance(side, str):
        if prompt is not None:
            return prompt, side
        head, mark, completion = side.rpartition(ASSISTANT_MARK)
        if not mark:
            raise DataError(f"row {number} has no 'prompt' and its answers no {ASSISTANT_MARK.strip()!r} to split at")
        return head + mark, completion
    if not side or side[-1]["role"] != "assistant":
        raise DataError(f"an answer of row {number} does not end with an assistant turn")
    *before, last = side
    if before:
        return before, last["content"]
    if prompt is None:
        raise DataError(f"row {number} has no 'prompt' and its answers are one turn long; give it a 'prompt'")
    return prompt, last["content"]
