"""Pairs, rankings and labels: sides, end tokens, budgets, and rows that are refused by number."""

import numpy as np
import pytest

from rljax.data.batches import DataPosition
from rljax.data.preferences import PreferenceSource, held_out_by_prompt, read_comparison, rows_of_split
from rljax.data.rows import DataError, load_rows
from rljax.data.tokenizer import character_tokenizer, load_tokenizer

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def letters():
    return character_tokenizer("abcdefgh ")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_pair_by_hand(letters):
    source = PreferenceSource([{"prompt": "ab", "chosen": "c", "rejected": "de"}], letters, 8, seed=0)
    _, batch, position = source.take(DataPosition(), 1)
    assert position == DataPosition(1, 0)
    # ids: <pad> 0, <bos> 1, <eos> 2, a 3, b 4, c 5, d 6, e 7
    np.testing.assert_array_equal(batch.tokens, [[1, 3, 4, 5, 2, 0, 0, 0], [1, 3, 4, 6, 7, 2, 0, 0]])
    np.testing.assert_array_equal(batch.valid.sum(1), [5, 6])
    np.testing.assert_array_equal(batch.loss_mask, [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.scores, [1, 0])
    np.testing.assert_array_equal(batch.row_id, [0, 1])
    assert batch.answer_valid.all() and batch.scores.dtype == np.float32


def test_a_side_over_the_budget_drops_the_pair_and_is_counted(letters):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c" * n} for n in (1, 5, 2)]
    source = PreferenceSource(rows, letters, 7, seed=0)  # BOS, a, five c, end: 8 tokens
    assert source.rows == [rows[0], rows[2]] and source.kept == (2, 1, 8, 7, 0)
    assert sorted(source.take(DataPosition(), 2)[1].row_id) == [0, 1, 4, 5]
    with pytest.raises(DataError, match="no preference row is left of 3: 3 too long, 0 unusable"):
        PreferenceSource(rows, letters, 3, seed=0)


def test_ragged_rankings(letters):
    rows = [
        {"prompt": "a", "completions": ["b", "c", "d"], "scores": [3, 1.5, 2]},
        {"prompt": "a", "completions": ["e", "f"], "scores": [0, 1]},
    ]
    source = PreferenceSource(rows, letters, 6, seed=0, kind="ranked", unit=3, shuffle=False)
    batch = source.take(DataPosition(), 2)[1]
    assert batch.tokens.shape == (6, 6)
    np.testing.assert_array_equal(batch.scores, [3, 1.5, 2, 0, 1, 0])
    np.testing.assert_array_equal(batch.answer_valid, [1, 1, 1, 1, 1, 0])
    assert not batch.loss_mask[5].any() and batch.valid[5].any()  # nothing to train, still a text that can be read
    np.testing.assert_array_equal(batch.row_id, np.arange(6))


def test_labels(letters):
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": False}]
    source = PreferenceSource(rows, letters, 6, seed=0, kind="labelled", unit=1, shuffle=False)
    batch = source.take(DataPosition(), 2)[1]
    np.testing.assert_array_equal(batch.scores, [1, 0])


def test_implicit_prompt_is_split_at_the_last_assistant_turn():
    talk = [user("a"), assistant("b"), user("c")]
    row = {"chosen": [*talk, assistant("d")], "rejected": [*talk, assistant("e")]}
    assert read_comparison(row, 0) == (talk, ["d", "e"], [1.0, 0.0])
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": text + " d", "rejected": text + " e"}
    assert read_comparison(row, 0) == (text, [" d", " e"], [1.0, 0.0])
    row = {"prompt": "a", "chosen": [assistant("d")], "rejected": [assistant("e")]}
    assert read_comparison(row, 0) == ("a", ["d", "e"], [1.0, 0.0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 7 has no 'rejected'; it has prompt, chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "row 7 has no 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected of row 7 are equal"),
        ({"prompt": "a", "completions": ["b"], "scores": [1]}, "row 7 has 1 answers to rank; give two or more"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1]}, "row 7 has 2 completions but 1 scores"),
        ({"prompt": "a", "completions": ["b", "c"]}, "row 7 has no 'scores'"),
        ({"prompt": "a", "completion": "b"}, "row 7 has no 'label'"),
        ({"prompt": 5, "chosen": "b", "rejected": "c"}, "prompt of row 7 is 5; it is a text, or a list of messages"),
        ({"prompt": "a", "chosen": 2, "rejected": 3}, "an answer of row 7 is 2; it is a text, or a list of messages"),
        ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, r"an answer of row 7 is \['b'\]; it is a text"),
        ({"prompt": "a", "chosen": [{"content": "b"}], "rejected": "c"}, "each with 'role' and 'content'"),
        ({"prompt": "a", "completions": "bc", "scores": [1, 2]}, "'completions' of row 7 is 'bc'; it is a list"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": 1}, "'scores' of row 7 is 1; it is a list"),
        (
            {"prompt": "a", "completions": ["b", "c"], "scores": [1, None]},
            "row 7 has a score or label that is no number",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": float("nan")},
            r"row 7 has a score or label that is no number: \[nan, 0.0\]",
        ),
        ({"chosen": "b", "rejected": "c"}, "row 7 has no 'prompt' and its answers no 'Assistant:' to split at"),
        ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "row 7 has no 'prompt' and its answers are one"),
        ({"chosen": [user("b")], "rejected": [user("c")]}, "an answer of row 7 does not end with an assistant turn"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("b")]},
            "the answers of row 7 continue different prompts",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(row, message):
    with pytest.raises(DataError, match=message):
        read_comparison(row, 7)


def test_bad_rows_raise_or_are_counted(letters):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(DataError, match="chosen and rejected of row 0 are equal"):
        PreferenceSource(rows, letters, 6, seed=0)
    source = PreferenceSource(rows, letters, 6, seed=0, bad_rows="drop")
    assert len(source) == 1 and len(source.bad) == 1 and source.kept.dropped == 0


def test_splits_are_by_prompt():
    rows = [{"prompt": f"p{i // 3}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(600)]
    parts = {split: {row["prompt"] for row in rows_of_split(rows, split)} for split in ("train", "dev", "test")}
    assert sum(map(len, parts.values())) == 200 and all(parts.values())
    assert not parts["train"] & parts["test"] and not parts["train"] & parts["dev"] and not parts["dev"] & parts["test"]
    assert sum(len(rows_of_split(rows, split)) for split in parts) == 600


def test_rows_of_one_prompt_are_held_out_together():
    rows = [{"prompt": p, "chosen": c, "rejected": "x"} for p, c in ("aA", "bB", "cC", "aD", "cE")]
    train, held = held_out_by_prompt(rows, 1)  # the last row's prompt has another row
    assert ([r["chosen"] for r in train], [r["chosen"] for r in held]) == (["A", "B", "D"], ["C", "E"])
    train, held = held_out_by_prompt(rows, 3)
    assert ([r["chosen"] for r in train], [r["chosen"] for r in held]) == (["B"], ["A", "C", "D", "E"])
    with pytest.raises(DataError, match="leaves none to train on"):
        held_out_by_prompt(rows, 5)


def test_another_seed_is_another_split():
    rows = [{"prompt": str(n), "chosen": "a", "rejected": "b"} for n in range(200)]
    splits = [{row["prompt"] for row in rows_of_split(rows, "test", seed=seed)} for seed in (0, 1)]
    assert splits[0] != splits[1] and all(8 <= len(split) <= 32 for split in splits)


def test_real_pairs(data_dir):
    rows = load_rows(str(data_dir / "datasets/prefs/hh_helpful_base_test.jsonl.gz"))
    tokenizer = load_tokenizer(str(data_dir / "tokenizers/gpt2"))
    source = PreferenceSource(rows[:400], tokenizer, 192, seed=0, bad_rows="drop")
    # Row 168 and row 354 change an earlier turn: the split point is not shared.
    assert len(source.bad) == 2 and source.bad[0].startswith("the answers of row 168 continue different prompts")
    picked, batch, _ = source.take(DataPosition(), 16)
    for k, row in enumerate(picked):
        for place, side in ((2 * k, "chosen"), (2 * k + 1, "rejected")):
            tokens, valid, mask = batch.tokens[place], batch.valid[place], batch.loss_mask[place]
            assert tokenizer.hf.decode(tokens[valid]) == row[side] + "<|endoftext|>"
            assert tokenizer.hf.decode(tokens[valid & ~mask]).endswith("\n\nAssistant:")


def test_answers_of_other_prompts_stand_behind_labelled_ones(letters):
    """KTO's rows: (x_i, y_i), then x_i with the answer of the next row that has another prompt; too long is absent."""
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "d", "completion": "eeee", "label": False},
        {"prompt": "ff", "completion": "g", "label": True},
    ]
    source = PreferenceSource(rows, letters, 7, seed=0, kind="labelled", unit=2, shuffle=False)
    _, batch, _ = source.take(DataPosition(), 4)
    texts = [letters.decode(ids[valid]) for ids, valid in zip(batch.tokens, batch.valid, strict=True)]
    assert texts == ["ab", "aeeee", "ac", "aeeee", "deeee", "dg", "ffg", "ffb"]
    np.testing.assert_array_equal(batch.scores, [1, 1, 0, 0, 0, 0, 1, 1])
    assert batch.answer_valid.all() and len(set(batch.row_id)) == 8
    long = [{"prompt": "a", "completion": "bbbb", "label": 1}, {"prompt": "ccc", "completion": "d", "label": 0}]
    source = PreferenceSource(long, letters, 7, seed=0, kind="labelled", unit=2, shuffle=False)
    _, batch, _ = source.take(DataPosition(), 2)  # BOS, ccc, bbbb, end: 9 tokens
    np.testing.assert_array_equal(batch.answer_valid, [1, 1, 1, 0])
    assert not batch.loss_mask[3].any()
    with pytest.raises(DataError, match="all rows have one prompt"):
        PreferenceSource(rows[:1], letters, 7, seed=0, kind="labelled", unit=2)


def test_pairs_of_a_ranking_are_the_best_against_a_worse_one(letters):
    """Zephyr's builder: the best of the scores, never against an equal text or an equal score."""
    ranking = {"prompt": "a", "completions": ["b", "c", "d", "d", "e"], "scores": [1, 2, 4, 0, 4]}
    source = PreferenceSource([ranking] * 40, letters, 6, seed=0, shuffle=False)
    _, batch, _ = source.take(DataPosition(), 40)
    texts = [letters.decode(ids[mask]) for ids, mask in zip(batch.tokens, batch.loss_mask, strict=True)]
    assert set(texts[0::2]) == {"d"} and set(texts[1::2]) == {"b", "c"}
    assert set(batch.scores[0::2]) == {4} and set(batch.scores[1::2]) == {1, 2}
    again = PreferenceSource([ranking] * 40, letters, 6, seed=0, shuffle=False).take(DataPosition(), 40)[1]
    np.testing.assert_array_equal(batch.tokens, again.tokens)


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}, "pairs", "no answer of row 0 is worse than its"),
        ({"prompt": "a", "completion": "b", "label": 1}, "pairs", "row 0 has one answer and a label"),
        ({"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 2, 3]}, "ranked", "more than algo.answers 2"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}, "ranked", "all answers of row 0 score 1, so it"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1, 2]}, "labelled", "row 0 has scores of 2 answers"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "labelled", "a score or label that is no number"),
    ],
)
def test_rows_of_another_kind_are_named(letters, row, kind, message):
    with pytest.raises(DataError, match=message):
        PreferenceSource([row], letters, 6, seed=0, kind=kind)
