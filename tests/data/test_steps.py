"""Outcomes and steps: which tokens carry which label, and rows that are refused by number."""

import numpy as np
import pytest

from rljax.data.batches import DataPosition
from rljax.data.rows import DataError
from rljax.data.steps import StepSource
from rljax.data.tokenizer import character_tokenizer, load_tokenizer

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def letters():
    return character_tokenizer("abcdefgh ")


def test_outcomes_and_steps_by_hand(letters):
    rows = [
        {"prompt": "a", "completion": "bc", "label": True},
        {"prompt": "a", "steps": ["bc", "d", "ef"], "labels": [1, 0.5, 0]},
    ]
    _, batch, _ = StepSource(rows, letters, 9, seed=0, shuffle=False).take(DataPosition(), 2)
    # BOS a b c end; BOS a b c d e f end
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(batch.label_mask, [[0, 0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(batch.labels, [[0, 0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0.5, 0, 0, 0, 0]])


def test_steps_end_in_the_token_that_holds_their_last_character(data_dir):
    """With a tokenizer of word pieces: what is decoded up to a labelled token holds the steps so far."""
    tokenizer = load_tokenizer(str(data_dir / "tokenizers" / "qwen2"))
    steps = ["First, 12 + 30 = 42.\n", "Then 42 / 7 = 6.\n", "The answer is 6."]
    row = {"prompt": "How many?", "steps": steps, "labels": [1, 1, 0]}
    _, batch, _ = StepSource([row], tokenizer, 64, seed=0).take(DataPosition(), 1)
    completion = batch.loss_mask[0] & (np.cumsum(batch.loss_mask[0]) > 0)
    for k, at in enumerate(np.flatnonzero(batch.label_mask[0])):
        upto = completion & (np.arange(64) <= at)
        before = completion & (np.arange(64) < at)
        assert tokenizer.decode(batch.tokens[0][upto]).startswith("".join(steps[: k + 1]))
        assert len(tokenizer.decode(batch.tokens[0][before])) < len("".join(steps[: k + 1]))
    np.testing.assert_array_equal(batch.labels[0][batch.label_mask[0]], [1, 1, 0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "b", "label": 1}, "row 0 has no 'prompt'; it has completion, label"),
        ({"prompt": "a", "completion": "b"}, "row 0 needs 'completion' and 'label', or 'steps' and 'labels'"),
        ({"prompt": "a", "steps": ["b"], "labels": [1, 0]}, "row 0 has 1 steps and 2 labels"),
        ({"prompt": "a", "steps": ["b", ""], "labels": [1, 0]}, "each step has text and a label"),
        ({"prompt": "a", "completion": "b", "label": 2}, "row 0 has labels \\[2\\]"),
        ({"prompt": "a", "completion": 3, "label": 1}, "row 0 has \\[3\\] with \\[1\\]; steps are a list of texts"),
        ({"prompt": "a", "steps": "bc", "labels": [1, 0]}, "row 0 has 'bc' with \\[1, 0\\]; steps are a list of texts"),
        ({"prompt": 4, "completion": "b", "label": 1}, "prompt of row 0 is 4; it is a text"),
    ],
)
def test_rows_that_cannot_be_used_are_named(letters, row, message):
    with pytest.raises(DataError, match=message):
        StepSource([row], letters, 6, seed=0)
