"""Fixed-shape NumPy batches of prompts and of supervised text. Order is a function of (seed, epoch)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from rljax.data.rows import DataError, Row
from rljax.data.tokenizer import Tokenizer

NO_LIMIT = np.iinfo(np.int32).max

TooLong = Literal["drop", "error"]
Encoded = tuple[Int[np.ndarray, " t"], Bool[np.ndarray, " t"]]  # tokens, and which of them are trained


class DataPosition(NamedTuple):
    """Where a run stands in its data; it is saved in the checkpoint."""

    epoch: int = 0
    taken: int = 0  # rows of this epoch that were used


class Kept(NamedTuple):
    """What a length limit left of the rows."""

    rows: int
    dropped: int
    longest: int  # tokens, over all rows
    limit: int
    bad: int = 0  # left out because they prefer nothing

    def __str__(self) -> str:
        unusable = f", {self.bad} left out as unusable" if self.bad else ""
        return (
            f"{self.rows} rows kept, {self.dropped} dropped as longer than {self.limit} tokens (longest {self.longest})"
            f"{unusable}"
        )


class PromptBatch(NamedTuple):
    """The fields of ``types.Prompts``, still on the host."""

    tokens: Int[np.ndarray, "b p"]
    valid: Bool[np.ndarray, "b p"]
    prompt_id: Int[np.ndarray, " b"]
    sample_id: Int[np.ndarray, " b"]
    max_new_tokens: Int[np.ndarray, " b"] | None = None


class SupervisedBatch(NamedTuple):
    """Right-padded text and what of it is trained."""

    tokens: Int[np.ndarray, "b t"]
    valid: Bool[np.ndarray, "b t"]
    loss_mask: Bool[np.ndarray, "b t"]
    row_id: Int[np.ndarray, " b"]


def draw(
    position: DataPosition, n: int, *, size: int, seed: int, shuffle: bool = True
) -> tuple[np.ndarray, DataPosition]:
    """The next ``n`` of ``size`` row numbers and the position behind them; a batch may reach into the next epoch."""
    parts: list[np.ndarray] = []
    epoch, taken = position
    while n:
        order = np.random.default_rng([seed, epoch]).permutation(size) if shuffle else np.arange(size)
        part = order[taken : taken + n]
        parts.append(part)
        n -= len(part)
        taken += len(part)
        if taken == size:
            epoch, taken = epoch + 1, 0
    return np.concatenate(parts), DataPosition(epoch, taken)


class PromptSource:
    """Prompts for rollouts, from rows with ``prompt`` (a text or messages) or ``messages``.

    Batches are left-padded to the smallest of ``prompt_lengths`` that fits all their prompts, so a run compiles at
    most that many programs. A prompt longer than the largest is dropped and counted in ``kept``, never cut.
    ``prompt_id`` is the row's number in ``rows``. Where rows have a column ``max_new_tokens``, it is the budget of
    their completions, below that of the sampler.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        prompt_lengths: Sequence[int],
        seed: int,
        *,
        shuffle: bool = True,
        too_long: TooLong = "drop",
    ):
        self.prompt_lengths = tuple(sorted(prompt_lengths))
        self.seed, self.shuffle, self.pad_id = seed, shuffle, tokenizer.pad_id
        encoded = [
            np.asarray(encode_row(i, tokenizer.render, prompt_of(row, i)), np.int32) for i, row in enumerate(rows)
        ]
        empty = next((number for number, ids in enumerate(encoded) if not len(ids)), None)
        if empty is not None:  # in a batch, a row without a prompt is padding
            raise DataError(f"the prompt of row {empty} has no token, and the tokenizer adds none; leave the row out")
        chosen, self.kept = within([len(ids) for ids in encoded], self.prompt_lengths[-1], too_long)
        self.rows = [rows[i] for i in chosen]
        self.prompt_ids = np.asarray(chosen, np.int32)
        self._encoded = [encoded[i] for i in chosen]
        self._budgets = _budgets(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, position: DataPosition, n: int) -> tuple[list[Row], PromptBatch, DataPosition]:
        """The next ``n`` rows and their prompts.

        ``sample_id`` counts how often a prompt stands earlier in this batch: 0, but where the batch wraps around the
        data set. ``repeat_prompts`` keeps copies apart by it.
        """
        picked, position = draw(position, n, size=len(self), seed=self.seed, shuffle=self.shuffle)
        encoded = [self._encoded[i] for i in picked]
        longest = max(map(len, encoded))
        width = next(length for length in self.prompt_lengths if length >= longest)
        tokens, valid = pad(encoded, width, self.pad_id, left=True)
        seen: dict[int, int] = {}
        copies = np.zeros(n, np.int32)
        for k, i in enumerate(picked):
            copies[k] = seen.get(i, 0)
            seen[i] = copies[k] + 1
        ids = self.prompt_ids[picked]
        budgets = None if self._budgets is None else self._budgets[ids]
        return [self.rows[i] for i in picked], PromptBatch(tokens, valid, ids, copies, budgets), position


def repeat_prompts(prompts: PromptBatch, group_size: int) -> PromptBatch:
    """Every prompt ``group_size`` times in a row, with ``sample_id`` 0 to ``group_size - 1``."""
    tokens, valid, prompt_id, copy, *budgets = (
        np.repeat(np.asarray(leaf), group_size, axis=0) for leaf in prompts if leaf is not None
    )
    within = np.tile(np.arange(group_size, dtype=np.int32), len(prompts.tokens))
    return PromptBatch(tokens, valid, prompt_id, copy * group_size + within, *budgets)


def _budgets(rows: Sequence[Row]) -> Int[np.ndarray, " b"] | None:
    """Each row's ``max_new_tokens``; None where no row has any."""
    given = [row.get("max_new_tokens") for row in rows]
    for number, budget in enumerate(given):
        if budget is not None and (not isinstance(budget, int) or not 1 <= budget <= NO_LIMIT):
            raise DataError(f"max_new_tokens of row {number} is {budget!r}; it takes a number of tokens, 1 or more")
    if all(budget is None for budget in given):
        return None
    return np.asarray([NO_LIMIT if budget is None else budget for budget in given], np.int32)


class SupervisedSource:
    """Text to train on: rows with ``prompt`` and a completion column, with ``messages``, or with ``text``.

    Trained are the completion, every assistant turn, or the whole text, each with its end token. A row longer than
    ``length`` is dropped and counted in ``kept`` (``too_long="drop"``) or is an error, never cut.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        length: int,
        seed: int,
        *,
        completion_column: str = "solution",
        shuffle: bool = True,
        too_long: TooLong = "drop",
    ):
        self.length, self.seed, self.shuffle, self.pad_id = length, seed, shuffle, tokenizer.pad_id
        encoded = [_supervised(row, number, tokenizer, completion_column) for number, row in enumerate(rows)]
        chosen, self.kept = within([len(ids) for ids, _ in encoded], length, too_long)
        self.rows = [rows[i] for i in chosen]
        self.row_ids = np.asarray(chosen, np.int32)
        self._encoded = [encoded[i] for i in chosen]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, position: DataPosition, n: int) -> tuple[list[Row], SupervisedBatch, DataPosition]:
        """The next ``n`` rows and their batch of shape [n, length]."""
        picked, position = draw(position, n, size=len(self), seed=self.seed, shuffle=self.shuffle)
        tokens, valid = pad([self._encoded[i][0] for i in picked], self.length, self.pad_id)
        loss_mask, _ = pad([self._encoded[i][1] for i in picked], self.length, 0)
        batch = SupervisedBatch(tokens, valid, loss_mask.astype(bool), self.row_ids[picked])
        return [self.rows[i] for i in picked], batch, position


def pad(
    sequences: Sequence[np.ndarray], width: int, fill: int, *, left: bool = False
) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Sequences as one array of ``width`` columns, and where it holds them."""
    values = np.full((len(sequences), width), fill, np.int32)
    valid = np.zeros((len(sequences), width), bool)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        values[row, place] = sequence
        valid[row, place] = True
    return values, valid


def encode_row(number: int, encode: Callable[..., Any], *parts: Any) -> Any:
    """``encode(*parts)``, whose ValueError becomes a DataError that names the row."""
    try:
        return encode(*parts)
    except ValueError as error:
        raise DataError(f"row {number} cannot be encoded: {error}") from error


def as_arrays(encoded: tuple[list[int], list[bool]]) -> Encoded:
    """Ids and mask as arrays: a data set of Python integers would take ten times the memory.

    The first token is never trained, whatever it is: nothing predicts it.
    """
    ids, mask = np.asarray(encoded[0], np.int32), np.asarray(encoded[1], bool)
    mask[:1] = False
    return ids, mask


def prompt_of(row: Row, number: int) -> str | list[dict[str, Any]]:
    """A row's prompt. Raises DataError that names the row when there is none, or when it holds the answer already."""
    name = "prompt" if row.get("prompt") is not None else "messages"
    if row.get(name) is None:
        raise DataError(f"row {number} has neither 'prompt' nor 'messages'; it has {', '.join(row)}; set the columns")
    prompt = check_text(row[name], name, number)
    if not isinstance(prompt, str) and (not len(prompt) or prompt[-1]["role"] == "assistant"):
        raise DataError(f"the prompt of row {number} has to end with a turn that the assistant answers")
    return prompt


def check_text(value: Any, name: str, number: int) -> Any:
    """A row's value as it is: a text, or messages. Raises DataError that names the row and what it is."""
    turns = value if isinstance(value, list | tuple) else [None]
    if not isinstance(value, str) and not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns):
        shown = repr(value) if len(repr(value)) < 50 else f"{repr(value)[:47]}..."
        raise DataError(
            f"{name} of row {number} is {shown}; it is a text, or a list of messages, each with 'role' and 'content'"
        )
    return value


def _supervised(row: Row, number: int, tokenizer: Tokenizer, completion_column: str) -> Encoded:
    def given(name: str) -> Any:
        return check_text(row[name], name, number)

    if row.get("prompt") is not None and row.get(completion_column) is not None:
        sides = given("prompt"), given(completion_column)
        return as_arrays(encode_row(number, tokenizer.render_with_completion, *sides))
    if row.get("messages") is not None:
        return as_arrays(encode_row(number, tokenizer.render_conversation, given("messages")))
    if row.get("text") is not None:
        return as_arrays(encode_row(number, tokenizer.render_with_completion, "", given("text")))
    raise DataError(
        f"row {number} has neither 'prompt' with {completion_column!r}, nor 'messages', nor 'text'; "
        f"it has {', '.join(row)}; set the columns"
    )


def within(lengths: Sequence[int], limit: int, too_long: TooLong) -> tuple[list[int], Kept]:
    """The numbers of the rows that fit."""
    chosen = [i for i, length in enumerate(lengths) if length <= limit]
    kept = Kept(len(chosen), len(lengths) - len(chosen), max(lengths, default=0), limit)
    if not chosen:
        raise DataError(
            f"none of {len(lengths)} rows fits {limit} tokens, the longest has {kept.longest}; raise the limit"
        )
    if kept.dropped and too_long == "error":
        first = next(i for i, length in enumerate(lengths) if length > limit)
        raise DataError(f"row {first} has {lengths[first]} tokens, the limit is {limit}; raise it or drop long rows")
    return chosen, kept
