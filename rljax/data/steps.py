"""Labelled prefixes as fixed-shape NumPy batches: outcomes of whole answers, and correctness of steps."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rljax.data.batches import DataPosition, as_arrays, check_text, draw, encode_row, pad, within
from rljax.data.rows import DataError, Row
from rljax.data.tokenizer import Tokenizer


class StepBatch(NamedTuple):
    """Right-padded answers and what is said of their prefixes."""

    tokens: Int[np.ndarray, "b t"]
    valid: Bool[np.ndarray, "b t"]
    loss_mask: Bool[np.ndarray, "b t"]  # the completion and its end token
    labels: Float[np.ndarray, "b t"]  # 1 right, 0 wrong, of the prefix that ends with the token
    label_mask: Bool[np.ndarray, "b t"]  # where there is a label
    row_id: Int[np.ndarray, " b"]


class StepSource:
    """Rows ``prompt, completion, label``, or ``prompt, steps, labels``: of either kind, each with labels in [0, 1].

    An outcome labels every token of the completion, its end token too. The completion of the second kind is its steps,
    one behind the other as they are; a label stands at the token in which its step ends. A row longer than ``length``
    tokens is dropped and counted in ``kept``, never cut. Raises DataError that names the row.
    """

    unit = 1  # sequences a row

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, length: int, seed: int, *, shuffle: bool = True):
        self.length, self.seed, self.shuffle, self.pad_id = length, seed, shuffle, tokenizer.pad_id
        encoded = [_encode(row, number, tokenizer) for number, row in enumerate(rows)]
        chosen, self.kept = within([len(ids) for ids, *_ in encoded], length, "drop")
        self.rows = [rows[i] for i in chosen]
        self.row_ids = np.asarray(chosen, np.int32)
        self._encoded = [encoded[i] for i in chosen]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, position: DataPosition, n: int) -> tuple[list[Row], StepBatch, DataPosition]:
        """The next ``n`` rows and their batch of shape [n, length]."""
        picked, position = draw(position, n, size=len(self), seed=self.seed, shuffle=self.shuffle)
        ids, masks, labels, label_masks = zip(*(self._encoded[i] for i in picked), strict=True)
        tokens, valid = pad(ids, self.length, self.pad_id)
        loss_mask, label_mask = (pad(each, self.length, 0)[0].astype(bool) for each in (masks, label_masks))
        values = np.zeros(tokens.shape, np.float32)
        for row, numbers in enumerate(labels):
            values[row, : len(numbers)] = numbers
        batch = StepBatch(tokens, valid, loss_mask, values, label_mask, self.row_ids[picked])
        return [self.rows[i] for i in picked], batch, position


def _encode(row: Row, number: int, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids, which of them are the completion, labels, and which of them are labelled."""
    if row.get("prompt") is None:
        raise DataError(f"row {number} has no 'prompt'; it has {', '.join(row)}")
    whole = row.get("steps") is None
    if row.get("completion" if whole else "labels") is None or (whole and row.get("label") is None):
        raise DataError(
            f"row {number} needs 'completion' and 'label', or 'steps' and 'labels'; it has {', '.join(row)}"
        )
    check_text(row["prompt"], "prompt", number)
    steps = [row["completion"]] if whole else row["steps"]
    given = [row["label"]] if whole else row["labels"]
    if not isinstance(steps, list) or not isinstance(given, list) or not all(isinstance(step, str) for step in steps):
        raise DataError(f"row {number} has {steps!r} with {given!r}; steps are a list of texts, labels one of numbers")
    if len(steps) != len(given) or not all(steps):
        raise DataError(f"row {number} has {len(steps)} steps and {len(given)} labels; each step has text and a label")
    if not all(isinstance(label, int | float) and 0 <= label <= 1 for label in given):
        raise DataError(f"row {number} has labels {given}; a label is a probability of being right, from 0 to 1")
    pair = encode_row(number, tokenizer.render_with_completion, row["prompt"], "".join(steps))
    ids, mask = as_arrays(pair)
    if whole:
        return ids, mask, np.where(mask, float(given[0]), 0.0), mask
    completion = np.flatnonzero(pair[1])
    labels, labelled = np.zeros(len(ids)), np.zeros(len(ids), bool)
    for end, label in zip(np.cumsum([len(step) for step in steps]), given, strict=True):
        at = completion[_token_of_end(tokenizer, ids[completion], int(end))]
        labels[at], labelled[at] = label, True
    return ids, mask, labels, labelled


def _token_of_end(tokenizer: Tokenizer, ids: np.ndarray, end: int) -> int:
    """The token that holds the last of the first ``end`` characters."""
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(tokenizer.decode(ids[: middle + 1].tolist())) >= end else (middle + 1, high)
    return low
