"""Train and evaluation that share rows are counted, with the rows."""

import pytest

from rljax.data import arithmetic
from rljax.data.overlap import count_overlap, duplicates, prompt_texts
from rljax.data.rows import load_rows

pytestmark = pytest.mark.fast

LONG = "one two three four five six seven eight nine"


def rows(*prompts):
    return [{"prompt": prompt} for prompt in prompts]


def test_counts_by_hand():
    train = rows("What is this?", LONG, "what is THIS", "a b c")
    evaluation = rows(
        "what is  this!",  # the first of train, but for case and marks
        "zero two three four five six seven eight nine ten",  # shares two .. nine with LONG: eight words
        "zero two three four five six seven eight ten",  # seven words only
        "a b c d",  # shorter than eight words: only a whole match counts
        "a b c d",
    )
    overlap = count_overlap(train, evaluation)
    assert overlap[:6] == (5, 4, 1, 2, 1, 1)
    assert overlap.examples == [(0, 0), (1, 1)]
    assert "of 5 prompts 1 are among the 4 others and 2 share 8 words" in str(overlap)


def test_signs_change_a_problem():
    assert count_overlap(rows("1+2-3="), rows("1-2+3=")).exact == 0


def test_messages_are_compared_by_their_content():
    train = [{"messages": [{"role": "user", "content": "Name a bird."}]}]
    assert count_overlap(train, rows("name a bird")).exact == 1


def test_what_is_learnt_from_is_compared_by_its_question():
    """Conversations that end with an answer, and plain text: supervised rows beside an evaluation."""
    turns = [{"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "Wren."}]
    other = [turns[0], {"role": "assistant", "content": "Crow."}]
    train = [{"messages": turns}, {"messages": other}, {"text": "Name a fish."}]
    overlap = count_overlap(train, rows("name a bird", "name a fish"))
    assert (overlap.exact, overlap.train_duplicates) == (2, 1)
    assert duplicates(prompt_texts(train)) == 1


def test_generated_splits_do_not_overlap():
    train = arithmetic.make_rows(split="train", count=2000)
    assert count_overlap(train, arithmetic.make_rows(split="test", count=512)).exact == 0


def test_gsm8k_train_against_test(data_dir):
    folder = str(data_dir / "datasets/gsm8k")
    train, test = (load_rows(folder, split, columns={"prompt": "question"}) for split in ("train", "test"))
    overlap = count_overlap(train, test)
    assert overlap.exact == 0 and 0 < overlap.shared_ngrams < 200
    copied = count_overlap([*train, *test[:10]], test)
    assert copied.exact == 10 and copied.train_duplicates == overlap.train_duplicates
    number, match = overlap.examples[0]
    words = [" ".join(text.lower().split()) for text in (test[number]["prompt"], train[match]["prompt"])]
    assert any(" ".join(words[0].split()[i : i + 4]) in words[1] for i in range(200))
