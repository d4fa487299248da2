"""Every form of a reward becomes one form, and columns reach the arguments that name them."""

import functools
import math

import numpy as np
import pytest

from rljax.rewards.base import Sample, Score, Span, as_reward, takes_batch

pytestmark = pytest.mark.fast

SAMPLE = Sample("2+3=", "5", row={"answer": "5", "level": 1, "prompt": "the row's own"})


def test_named_columns_are_passed_and_no_others():
    def reward(prompt, completion, answer):
        assert prompt == "2+3="
        return completion == answer

    assert as_reward(reward)([SAMPLE]) == [Score(1.0)]


def test_double_star_gets_all_columns_but_the_rows_own_prompt():
    seen = {}

    def reward(prompt, completion, **columns):
        seen.update(columns, prompt=prompt)
        return 0

    as_reward(reward)([SAMPLE])
    assert seen == {"answer": "5", "level": 1, "prompt": "2+3="}


def test_keyword_only_columns_and_defaults():
    def reward(prompt, completion, *, level, scale=10):
        return level * scale

    assert as_reward(reward)([SAMPLE]) == [Score(10.0)]
    assert as_reward(reward)([SAMPLE._replace(row={"level": 2, "scale": 3})]) == [Score(6.0)]


def test_bound_option_stands_before_a_column():
    def reward(prompt, completion, level, scale=10):
        return level * scale

    row = {"level": 2, "scale": 3}
    assert as_reward(functools.partial(reward, scale=100))([SAMPLE._replace(row=row)]) == [Score(200.0)]


def test_sample_form_and_full_score():
    def reward(sample, bonus=1):
        return Score(len(sample.completion) + bonus, True, "5", {"length": 1.0}, (Span(0, 1, 2.0),))

    assert as_reward(reward)([SAMPLE]) == [Score(2.0, True, "5", {"length": 1.0}, (Span(0, 1, 2.0),))]


class GroupRank:
    """Rank within the batch: needs all samples at once."""

    def batch(self, samples):
        return [sorted(s.completion for s in samples).index(sample.completion) for sample in samples]


def test_batch_form_sees_all_samples():
    assert takes_batch(GroupRank()) and not takes_batch(lambda sample: 0)
    scores = as_reward(GroupRank())([SAMPLE._replace(completion=c) for c in "cab"])
    assert [score.value for score in scores] == [2.0, 0.0, 1.0]


def test_numbers_of_any_kind_become_floats_and_none_becomes_nan():
    values = [True, 2, np.float32(0.5), np.int64(3), None]
    scores = [as_reward(lambda sample, v=v: v)([SAMPLE])[0].value for v in values]
    assert scores[:4] == [1.0, 2.0, 0.5, 3.0] and math.isnan(scores[4])
    assert all(type(value) is float for value in scores)


def test_mistakes_are_one_sentence():
    def wants_column(prompt, completion, target):
        return 0

    def two_unknowns(question, reply):
        return 0

    def needs_option(sample, *, limit):
        return 0

    class WrongCount:
        def batch(self, samples):
            return [1.0]

    with pytest.raises(ValueError, match=r"wants_column needs the column 'target'.*it has 'answer', 'level', 'prompt'"):
        as_reward(wants_column)([SAMPLE])
    with pytest.raises(ValueError, match=r"two_unknowns\(question, reply\) has a form that is not known: write f"):
        as_reward(two_unknowns)
    with pytest.raises(ValueError, match=r"WrongCount.batch gave 1 scores for 2 samples"):
        as_reward(WrongCount())([SAMPLE, SAMPLE])
    with pytest.raises(ValueError, match="needs_option needs the option 'limit'"):
        as_reward(needs_option)
    with pytest.raises(TypeError, match="not with the text '1'"):
        as_reward(lambda sample: "1")([SAMPLE])
