"""Preference rows as fixed-shape NumPy batches: pairs, rankings of K answers, and single answers with a label."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rljax.data.batches import DataPosition, Encoded, Kept, as_arrays, check_text, draw, encode_row, pad
from rljax.data.rows import DataError, Row
from rljax.data.splits import split_of
from rljax.data.tokenizer import Messages, Tokenizer

Text = str | Messages
Kind = Literal["pairs", "ranked", "labelled"]
# Where the last answer starts in a dialogue stored as one text (the format of hh-rlhf).
ASSISTANT_MARK = "\n\nAssistant:"


class Comparison(NamedTuple):
    """One row in the form that all kinds share: a prompt, its answers, and a score for each."""

    prompt: Text
    completions: list[str]
    scores: list[float]


class PreferenceBatch(NamedTuple):
    """The ``unit`` sequences of a row stand one behind the other: chosen is ``[0::2]``, rejected ``[1::2]``.

    A row with fewer answers repeats its last one, with ``answer_valid`` and ``loss_mask`` False.
    """

    tokens: Int[np.ndarray, "b t"]  # right-padded
    valid: Bool[np.ndarray, "b t"]
    loss_mask: Bool[np.ndarray, "b t"]  # the completion and its end token
    scores: Float[np.ndarray, " b"]  # pairs: 1 and 0, or their scores; rankings: theirs; labels: 1 or 0
    answer_valid: Bool[np.ndarray, " b"]
    row_id: Int[np.ndarray, " b"]  # number of the row times ``unit``, plus which sequence: a key for cached log-probs


class Unit(NamedTuple):
    """What stands together: the sequences of one comparison. None is a sequence that is not there."""

    number: int
    encoded: list[Encoded | None]
    scores: list[float]


class PreferenceSource:
    """Rows ``prompt, chosen, rejected``, or ``prompt, completions, scores``, or ``prompt, completion, label``.

    Sides are texts or messages. Without ``prompt``, or with whole conversations as sides, the prompt is what both
    share up to the last assistant turn. ``kind`` says what is made of them, ``unit`` how many sequences:

    pairs: chosen and rejected, scored 1 and 0 or ``chosen_score`` and ``rejected_score``; of a ranking the best answer
        against a random worse one (2310.16944).
    ranked: up to ``unit`` answers and their scores.
    labelled: one answer and its label, a pair being two of them; with ``unit`` 2 also that answer's prompt with the
        answer of the next row that has another prompt (KTO's mismatched rows).

    A row with an answer longer than ``length`` tokens, prompt and end token included, is dropped whole and counted in
    ``kept``. A row that cannot be used (a side missing, both sides equal, two prompts, one answer) is an error that
    names it, or with ``bad_rows="drop"`` is counted in ``bad``.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        length: int,
        seed: int,
        *,
        kind: Kind = "pairs",
        unit: int = 2,
        shuffle: bool = True,
        bad_rows: Literal["error", "drop"] = "error",
    ):
        self.length, self.seed, self.shuffle, self.pad_id = length, seed, shuffle, tokenizer.pad_id
        self.unit = unit
        self.bad: list[str] = []
        self.rows: list[Row] = []
        self._units: list[Unit] = []
        comparisons: list[Comparison] = []
        longest = dropped = 0
        for number, row in enumerate(rows):
            try:
                found = _comparisons(row, number, kind, unit, seed)
            except DataError as error:
                if bad_rows == "error":
                    raise
                self.bad.append(str(error))
                continue
            encoded = [[_encode(tokenizer, number, c.prompt, side) for side in c.completions] for c in found]
            lengths = [len(ids) for sides in encoded for ids, _ in sides]
            longest = max(longest, *lengths)
            if max(lengths) > length:
                dropped += 1
                continue
            for k, (comparison, sides) in enumerate(zip(found, encoded, strict=True)):
                self.rows.append({**row, "prompt": comparison.prompt})
                self._units.append(Unit(number * 2 + k if kind == "labelled" else number, [*sides], comparison.scores))
                comparisons.append(comparison)
        self.kept = Kept(len(self.rows), dropped, longest, length, len(self.bad))
        if not self.rows:
            raise DataError(f"no preference row is left of {len(rows)}: {dropped} too long, {len(self.bad)} unusable")
        if kind == "labelled" and unit == 2:
            self._add_mismatched(tokenizer, comparisons)

    def _add_mismatched(self, tokenizer: Tokenizer, comparisons: list[Comparison]) -> None:
        for i, (unit, comparison) in enumerate(zip(self._units, comparisons, strict=True)):
            following = (comparisons[(i + step) % len(comparisons)] for step in range(1, len(comparisons)))
            other = next((c for c in following if c.prompt != comparison.prompt), None)
            if other is None:
                raise DataError(
                    "all rows have one prompt, so no answer is another prompt's; use pairs in place of labels"
                )
            encoded = _encode(tokenizer, unit.number // 2, comparison.prompt, other.completions[0])
            unit.encoded.append(encoded if len(encoded[0]) <= self.length else None)
            unit.scores.append(unit.scores[0])

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, position: DataPosition, n: int) -> tuple[list[Row], PreferenceBatch, DataPosition]:
        """The next ``n`` rows and their batch of shape [n * unit, length]."""
        picked, position = draw(position, n, size=len(self), seed=self.seed, shuffle=self.shuffle)
        sequences, masks, scores, answer_valid, row_id = [], [], [], [], []
        for i in picked:
            number, encoded, row_scores = self._units[i]
            for k in range(self.unit):
                there = encoded[k] if k < len(encoded) else None
                ids, mask = there or next(e for e in reversed(encoded) if e is not None)
                sequences.append(ids)
                masks.append(mask & (there is not None))
                scores.append(row_scores[k] if there is not None else 0.0)
                answer_valid.append(there is not None)
                row_id.append(number * self.unit + k)
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


def _encode(tokenizer: Tokenizer, number: int, prompt: Text, completion: str) -> Encoded:
    return as_arrays(encode_row(number, tokenizer.render_with_completion, prompt, completion))


def _comparisons(row: Row, number: int, kind: Kind, unit: int, seed: int) -> list[Comparison]:
    """What a row gives to compare. Raises DataError where it does not fit the kind."""
    whole = read_comparison(row, number)
    count = len(whole.completions)
    if count == 1 and kind != "labelled":
        raise DataError(
            f"row {number} has one answer and a label, and this compares answers; use kto or bco for labels"
        )
    if kind == "pairs":
        return [best_against_other(whole, number, seed) if "completions" in row else whole]
    if kind == "ranked":
        if count > unit:
            raise DataError(f"row {number} has {count} answers, more than algo.answers {unit}; raise that")
        if len(set(whole.scores)) == 1:
            raise DataError(f"all answers of row {number} score {whole.scores[0]:g}, so it prefers none; leave it out")
        return [whole]
    if count == 1:
        return [whole]
    if "completions" in row:
        raise DataError(f"row {number} has scores of {count} answers, and this needs one answer and a label a row")
    return [
        Comparison(whole.prompt, [side], [label]) for side, label in zip(whole.completions, (1.0, 0.0), strict=True)
    ]


def best_against_other(ranking: Comparison, number: int, seed: int) -> Comparison:
    """The best answer and a random one that scores less, never an equal text (Zephyr, 2310.16944, section 3)."""
    best = int(np.argmax(ranking.scores))
    text, score = ranking.completions[best], ranking.scores[best]
    worse = [
        k for k, other in enumerate(ranking.completions) if ranking.scores[k] < score and other.strip() != text.strip()
    ]
    if not worse:
        raise DataError(f"no answer of row {number} is worse than its best, so it prefers nothing; leave it out")
    other = worse[int(np.random.default_rng([seed, number]).integers(len(worse)))]
    return Comparison(ranking.prompt, [text, ranking.completions[other]], [score, ranking.scores[other]])


def is_comparison(row: Row) -> bool:
    """Whether a row holds answers that are judged, of any kind, steps too."""
    return any(row.get(name) is not None for name in ("chosen", "completions", "completion", "steps"))


def held_out_by_prompt(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    """All rows but the last, and so many of the last, or a few more: rows of one prompt stay together."""
    prompts = [str(read_comparison_prompt(row, number)) for number, row in enumerate(rows)]
    sizes, held, found = Counter(prompts), set[str](), 0
    for prompt in reversed(prompts):
        if found >= count:
            break
        found += sizes[prompt] * (prompt not in held)
        held.add(prompt)
    train = [row for row, prompt in zip(rows, prompts, strict=True) if prompt not in held]
    if not train:
        raise DataError(f"holding out {count} rows leaves none to train on: their prompts are those of all rows")
    return train, [row for row, prompt in zip(rows, prompts, strict=True) if prompt in held]


def rows_of_split(rows: Sequence[Row], split: str, *, seed: int = 0) -> list[Row]:
    """The preference rows that belong to a split, decided by the prompt: rows of one prompt stay together."""
    prompts = [read_comparison_prompt(row, number) for number, row in enumerate(rows)]
    return [row for row, prompt in zip(rows, prompts, strict=True) if split_of(f"prompt{seed or ''}:{prompt}") == split]


def read_comparison(row: Row, number: int) -> Comparison:
    """Any kind of preference row in one form. Raises DataError that names the row."""
    if "completions" in row or "scores" in row:
        completions, scores = _list(row, "completions", number), _list(row, "scores", number)
        if len(completions) < 2:
            raise DataError(f"row {number} has {len(completions)} answers to rank; give two or more, or a label")
        if len(completions) != len(scores):
            raise DataError(f"row {number} has {len(completions)} completions but {len(scores)} scores")
    elif "label" in row or "completion" in row:
        completions, scores = [_side(row, "completion", number)], [_side(row, "label", number)]
    else:
        completions = [_side(row, side, number) for side in ("chosen", "rejected")]
        scores = [row.get("chosen_score", 1.0), row.get("rejected_score", 0.0)]
    prompt = row.get("prompt")
    if prompt is not None:
        check_text(prompt, "prompt", number)
    parts = [_split_side(side, prompt, number) for side in completions]
    if any(prompt != parts[0][0] for prompt, _ in parts):
        raise DataError(f"the answers of row {number} continue different prompts; give it a 'prompt' or leave it out")
    texts = [text for _, text in parts]
    if "chosen" in row and texts[0] == texts[1]:
        raise DataError(f"chosen and rejected of row {number} are equal, so it prefers nothing; leave it out")
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise DataError(f"row {number} has a score or label that is no number: {scores}")
    return Comparison(parts[0][0], texts, numbers)


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


def _list(row: Row, name: str, number: int) -> list[Any]:
    value = _side(row, name, number)
    if not isinstance(value, list | tuple):
        raise DataError(f"{name!r} of row {number} is {value!r}; it is a list, one entry an answer")
    return list(value)


def _split_side(side: Text, prompt: Text | None, number: int) -> tuple[Text, str]:
    """A side as (prompt, completion)."""
    check_text(side, "an answer", number)
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
