"""Estimates against brute-force enumeration of subsets, hand votes, and coverage of the intervals."""

import itertools
import statistics

import numpy as np
import pytest

from rljax.rewards.estimates import (
    best_of_n,
    bootstrap_interval,
    maj_at_k,
    paired_difference,
    pass_at_k,
    rerank_at_k,
    win_rates,
)

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = itertools.combinations([True] * c + [False] * (n - c), k)
            assert pass_at_k(n, c, k) == pytest.approx(statistics.mean(map(any, subsets)), abs=1e-12)


def test_pass_at_k_of_many_samples_stays_exact():
    # 1 − C(1999, 1000) / C(2000, 1000) = 1 − 1000/2000
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "correct", "value"),
    [
        (["4", "5", "4"], [True, False, True], 1.0),
        (["5", "4", "5"], [False, True, False], 0.0),
        (["4", "5"], [True, False], 0.5),
        (["4", "5", "6", "4", "5"], [1, 0, 0, 1, 0], 0.5),
        ([None, None, "4"], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
    ],
)
def test_maj_at_k(answers, correct, value):
    assert maj_at_k(answers, correct) == value
    order = range(len(answers))
    for shuffled in itertools.permutations(order):
        assert maj_at_k([answers[i] for i in shuffled], [correct[i] for i in shuffled]) == value


def test_maj_and_rerank_at_k_read_the_first_k():
    assert maj_at_k(["5", "4", "4"], [False, True, True], k=1) == 0.0
    assert rerank_at_k([0.1, 0.9], [True, False], k=1) == 1.0


def test_rerank_at_k():
    assert rerank_at_k([0.1, 0.9, 0.5], [False, True, False]) == 1.0
    assert rerank_at_k([0.1, 0.9, 0.95], [False, True, False]) == 0.0
    assert rerank_at_k([0.9, 0.9, 0.1], [True, False, True]) == 0.5


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    for scores in (rng.normal(size=6), np.array([1.0, 3.0, 2.0, 3.0, 1.0, 3.0])):
        values = rng.normal(size=6)
        for n in range(1, 7):
            subsets = [list(s) for s in itertools.combinations(range(6), n)]
            assert best_of_n(scores, n) == pytest.approx(np.mean([scores[s].max() for s in subsets]), abs=1e-12)
            chosen = [values[s][scores[s] == scores[s].max()].mean() for s in subsets]
            assert best_of_n(scores, n, values) == pytest.approx(np.mean(chosen), abs=1e-12)


def test_best_of_n_of_right_and_wrong_is_pass_at_k():
    for k in (1, 4, 16):
        assert best_of_n([1.0] * 3 + [0.0] * 13, k) == pytest.approx(pass_at_k(16, 3, k), abs=1e-12)


def test_bootstrap_is_deterministic_and_near_the_normal_interval():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    interval = bootstrap_interval(values)
    assert interval == bootstrap_interval(values) and interval != bootstrap_interval(values, seed=1)
    # The half width of a mean of 400 is about 1.96 · std / 20.
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert bootstrap_interval([0.5] * 7) == (0.5, 0.5)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    intervals = [bootstrap_interval(rng.random(100) < 0.3, confidence=0.9, resamples=400, seed=i) for i in range(200)]
    covered = sum(interval.low <= 0.3 <= interval.high for interval in intervals)
    # Binomial(200, .9) has standard deviation 4.2; four of them.
    assert abs(covered - 180) <= 17


def test_bootstrap_over_runs_is_wider_when_runs_differ():
    problems = np.random.default_rng(3).random((200, 1))
    same, apart = np.repeat(problems, 3, axis=1), problems + np.array([-0.3, 0.0, 0.3])
    narrow, wide = bootstrap_interval(same), bootstrap_interval(apart)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_paired_difference_sees_what_two_intervals_do_not():
    rng = np.random.default_rng(4)
    before = rng.normal(0, 10, size=200)
    after = before + 0.5 + rng.normal(0, 0.1, size=200)
    difference = paired_difference(after, before)
    assert difference.low > 0.48 and difference.high < 0.52
    assert bootstrap_interval(after).low < bootstrap_interval(before).high
    assert difference.mean == pytest.approx((after - before).mean(), abs=1e-12)
    assert paired_difference(before, before) == (0.0, 0.0, 0.0)


def test_win_rates_by_hand():
    """1 and 3 against 2: one win in two. 1 against 0, 1, 2 and 1: a win, two ties and a loss."""
    np.testing.assert_allclose(win_rates([[1, 3]], [[2]]), [0.5])
    np.testing.assert_allclose(win_rates([[1], [5]], [[0, 1, 2, 1], [0, 0, 0, 9]]), [0.5, 0.75])
    ours, theirs = np.random.default_rng(5).integers(0, 4, (2, 6, 3))
    np.testing.assert_allclose(win_rates(ours, theirs) + win_rates(theirs, ours), 1)


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="got n=4, c=5, k=1"):
        pass_at_k(4, 5, 1)
    with pytest.raises(ValueError, match="got n=4, c=1, k=5"):
        pass_at_k(4, 1, 5)
    with pytest.raises(ValueError, match="1 <= k <= n and a verdict a sample"):
        maj_at_k([], [])
    with pytest.raises(ValueError, match="1 <= n <= m"):
        best_of_n([1.0], 2)
    with pytest.raises(ValueError, match="finite values"):
        bootstrap_interval([1.0, float("nan")])
    with pytest.raises(ValueError, match="win rate needs"):
        win_rates([[1.0]], [[1.0], [2.0]])
    with pytest.raises(ValueError, match="same problems twice"):
        paired_difference([1.0], [1.0, 2.0])
