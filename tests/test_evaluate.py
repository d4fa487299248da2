"""What is said of several samples a problem, by hand."""

import numpy as np
import pytest

from rljax.evaluate import all_metrics, choice_metrics, score_metrics

pytestmark = pytest.mark.fast

# Three problems, four samples each.
CORRECT = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
ANSWERS = [["7", "7", "8", "9"], ["3", "4", "3", None], [None, None, None, None]]


def test_votes_and_ranks_by_hand():
    # Votes: 7 wins and is right; 3 wins (two of three votes) and is wrong; nobody votes. Ranks: sample 2, 1 and 0 have
    # the highest scores: wrong, right, wrong.
    ranks = np.array([[0.1, 0.2, 0.9, 0.0], [0.0, 0.5, 0.4, 0.3], [1.0, 0.0, 0.0, 0.0]])
    found = choice_metrics(CORRECT, ANSWERS, ranks)
    assert found["maj_at_4"] == pytest.approx(1 / 3) and found["rerank_at_4"] == pytest.approx(1 / 3)
    # Means of three zeros or ones: under 4 % of the draws are all right, 30 % all wrong.
    assert (found["maj_at_4_low"], found["maj_at_4_high"]) == (0, 1)


def test_nothing_is_said_of_what_nobody_judges_or_states():
    assert choice_metrics(np.full((2, 2), -1), [["1", "1"], ["2", None]], None) == {}
    assert choice_metrics(CORRECT, [[None] * 4] * 3, None) == {}
    assert choice_metrics(CORRECT[:, :1], [], None) == {}


def test_the_score_is_the_share_of_right_ones_else_the_mean_reward():
    rewards = CORRECT * 2.0
    judged = score_metrics(rewards, CORRECT)
    # Means of problems 1/2, 1/4, 0. pass@2 = 1 - C(n-c, 2)/C(4, 2): 1 - 1/6, 1 - 3/6, 0.
    assert judged["score"] == pytest.approx(0.25) and judged["n"] == 3 and judged["samples"] == 4
    assert judged["pass_at_2"] == pytest.approx((5 / 6 + 1 / 2) / 3)
    assert (judged["pass_at_2_low"], judged["pass_at_2_high"]) == (0, pytest.approx(5 / 6))
    assert judged["score_low"] <= 0.25 <= judged["score_high"]
    assert score_metrics(rewards, np.full_like(CORRECT, -1))["score"] == pytest.approx(0.5)


def test_a_greedy_completion_is_the_score_and_the_samples_are_counted_by_themselves():
    # The first column is greedy: 1, 0, 0 of three. The samples: 1/3, 1/3, 0; pass@2 = 1 - C(2, 2)/C(3, 2) twice, and 0.
    found = all_metrics(CORRECT * 2.0, CORRECT, greedy=True)
    assert found["score"] == pytest.approx(1 / 3) and found["reward"] == pytest.approx(2 / 3)
    assert found["sampled_score"] == pytest.approx(2 / 9) and found["samples"] == 3
    assert found["pass_at_2"] == pytest.approx(2 * (2 / 3) / 3)
    assert found["score_low"] <= 1 / 3 <= found["score_high"]
    assert found["sampled_score_low"] <= 2 / 9 <= found["sampled_score_high"]
    assert all_metrics(CORRECT * 2.0, CORRECT, greedy=False) == score_metrics(CORRECT * 2.0, CORRECT)
