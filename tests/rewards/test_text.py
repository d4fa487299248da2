"""Prose and tag rewards on small strings worked by hand, and on real TinyStories."""

import functools

import pytest

from rljax.rewards.base import Sample, as_reward
from rljax.rewards.tags import strip_reasoning, think_answer_format, think_format
from rljax.rewards.text import (
    distinct_n,
    finished,
    inflections,
    length_cost,
    overlong,
    real_words,
    required_words,
    story,
    unrepeated,
)

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("The dog stopped. It was happy to eat ice creams.", 1.0),
        ("DOG! stop happy ice cream", 1.0),
        ("The dog's stops", 0.5),
        ("Dogma, nonstop, unhappy, ice and cream", 0.0),
        ("", 0.0),
    ],
)
def test_required_words(completion, value):
    score = required_words("dog stop happy ice cream", completion, ["dog", "stop", "happy", "ice cream"])
    assert score.value == value and score.correct == (value == 1.0)
    assert required_words("", completion, "dog, stop,happy,ice cream, ").value == value


def test_required_words_of_nothing_are_all_there():
    assert required_words("", "any", []).value == 1.0


@pytest.mark.parametrize(
    ("word", "forms", "others"),
    [
        ("stop", ["stops", "stopped", "stopping"], ["stopper"]),
        ("cry", ["cries", "cried", "crying"], ["crys"]),
        ("play", ["plays", "played", "playing"], ["plaies"]),
        ("bake", ["bakes", "baked", "baking"], ["bakked"]),
        ("see", ["sees", "seeing"], ["saw"]),
        ("box", ["boxes", "boxed"], ["boxxed"]),
        ("run", ["runs", "running"], ["ran"]),
    ],
)
def test_inflections(word, forms, others):
    assert {word, *forms} <= inflections(word)
    assert not inflections(word) & set(others)


@pytest.mark.parametrize(
    ("completion", "value", "correct"),
    [
        ("He ran far. She sat down there.", 1.0, True),
        # 3 of 4 sentences are new; a b c d a b c d e a b c d f has 11 4-grams, of which abcd stands three times
        ("A b c d! A b c d. E a b c d. F.", 0.75 * 9 / 11, False),
        ("Yes", 1.0, True),
        ("... !", 0.0, False),
        ("", 0.0, False),
    ],
)
def test_unrepeated(completion, value, correct):
    score = unrepeated("", completion)
    assert score.value == pytest.approx(value, abs=1e-12) and score.correct is correct


def test_story_by_hand():
    row = {"words": ["cat", "moon"]}
    whole = story(Sample("", "A cat saw the moon. It slept.", finished=True, row=row))
    assert (whole.value, whole.correct) == (1.0, True)
    assert whole.parts == {"words": 1.0, "told": 1.0, "finished": 1.0, "unrepeated": 1.0}
    assert story(Sample("", "A cat saw the moon. It slept.", finished=False, row=row)).value == 0.5
    assert story(Sample("", "A cat slept.", finished=True, row=row)).value == 0.5
    assert story(Sample("", "The sun rose.", finished=True, row=row)).value == 0.0
    assert story(Sample("", "", finished=True, row=row)).value == 0.0
    # Words 1, finished, half of the sentences new; cat moon cat moon has one 4-gram.
    short = story(Sample("", "A cat saw the moon. It slept.", finished=True, row={**row, "sentences": 3}))
    assert short.parts["told"] == short.value == 2 / 3 and not short.correct
    long = story(Sample("", "A cat saw the moon. It slept.\nIt woke! Why?", finished=True, row={**row, "sentences": 3}))
    assert long.parts["told"] == long.value == 1 and long.correct
    twice = story(Sample("", "Cat moon. Cat moon.", finished=True, row=row))
    assert (twice.value, twice.correct) == (0.75, False)


def test_real_words_by_hand(tmp_path):
    """a, cat and sat stand twice; of 20 words one is strange: 1 - 10/20."""
    (tmp_path / "a.txt").write_text("A cat sat. One moon.")
    (tmp_path / "b.txt").write_text("a CAT sat; two?")
    corpus = f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}"
    assert real_words("", "Sat a cat!", corpus) == 1.0
    assert real_words("", "cat " * 19 + "moon", corpus) == 0.5
    assert real_words("", "cat moon", corpus) == 0.0
    assert real_words("", "", corpus) == 0.0


def test_real_stories_do_not_repeat_and_doubled_ones_do(data_dir):
    stories = (data_dir / "datasets/text/tinystories_a.txt").read_text().split("<|endoftext|>")
    stories = [text.strip() for text in stories if text.strip()]
    values = [unrepeated("", text).value for text in stories]
    assert len(values) == 1728
    assert 0.98 < sum(values) / len(values) < 0.99
    assert min(values) > 0.5
    assert max(unrepeated("", f"{text}\n{text}").value for text in stories) < 0.3


def test_distinct_n_by_hand():
    # 2-grams: a b, b a, a b | a b, b c: five of which three are distinct
    assert distinct_n(["a b a b", "A b, c!"], 2) == 3 / 5
    assert distinct_n(["a b", "c"], 3) == 0.0
    assert distinct_n(["it's one two", "it’s one two"], 3) == 1 / 2


def test_lengths():
    def sample(count):
        return Sample("", "x", token_ids=range(count))

    # budget 100, buffer 20: free up to 80, half way at 90, everything at 100
    penalty = functools.partial(overlong, max_new_tokens=100, buffer_tokens=20, factor=2.0)
    scores = as_reward(penalty)([sample(0), sample(80), sample(90), sample(100)])
    assert [score.value for score in scores] == [0.0, 0.0, -1.0, -2.0]
    assert length_cost(sample(7), per_token=0.5) == -3.5
    assert [finished(Sample("", "", finished=f)) for f in (True, False)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("prompt", "completion", "value", "tags"),
    [
        ("", "<think>hm</think> 4", 1.0, 1.0),
        ("Q\n<think>\n", "hm</think> 4", 1.0, 1.0),
        ("", "<think></think>4", 1.0, 1.0),
        ("", "<think>hm</think>", 0.0, 1.0),
        ("", "so <think>hm</think> 4", 0.0, 1.0),
        ("", "<think>hm</think><think>hm</think> 4", 0.0, 0.0),
        ("", "<think>hm 4", 0.0, 0.5),
        ("", "4", 0.0, 0.0),
    ],
)
def test_think_format(prompt, completion, value, tags):
    score = think_format(prompt, completion)
    assert (score.value, score.parts["tags"]) == (value, tags)


@pytest.mark.parametrize(
    ("completion", "value", "tags"),
    [
        ("<think>hm</think>\n<answer>4</answer>\n", 1.0, 1.0),
        ("<think>hm</think><answer> </answer>", 0.0, 1.0),
        ("<think>hm</think><answer>4</answer> done", 0.0, 1.0),
        ("<think>hm</think> 4", 0.0, 0.5),
        ("<think>hm</think><answer>4</answer><answer>5</answer>", 0.0, 0.5),
    ],
)
def test_think_answer_format(completion, value, tags):
    score = think_answer_format("", completion)
    assert (score.value, score.parts["tags"]) == (value, tags)


@pytest.mark.parametrize(
    ("prompt", "completion", "answer"),
    [
        ("", "<think>5?</think> 4", "4"),
        ("Q <think>", "5? </think><answer>4</answer>", "4"),
        ("Q <think>", "5? no", ""),
        ("", "4 <think>or 5", "4"),
        ("", "<think>or 5", ""),
        ("", "<think>1</think> 2 <think>3</think> 4", "4"),
        ("", "<think>1</think> 2 <think>3", "2"),
        ("", "just 4", "just 4"),
    ],
)
def test_strip_reasoning(prompt, completion, answer):
    assert strip_reasoning(prompt, completion) == answer
