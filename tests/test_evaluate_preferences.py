"""What is said of held-out comparisons, by hand and against brute force."""

import math

import numpy as np

from rljax.evaluate_preferences import (
    area_under_curve,
    better_answers,
    calibration_error,
    comparison_metrics,
    label_metrics,
    separation_metrics,
)
from rljax.reference import CachedLogprobs


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_pairs_by_hand() -> None:
    """Gaps 2, -1, 0 and a pair without its second side: accuracy (1 + 0 + .5) / 3, margin 1/3."""
    rewards = np.array([[3.0, 1.0], [0.0, 1.0], [2.0, 2.0], [9.0, 0.0]])
    lengths = np.array([[10.0, 11.0], [30.0, 10.0], [10.0, 20.0], [1.0, 1.0]])
    valid = np.array([[True, True]] * 3 + [[True, False]])
    metrics = comparison_metrics(rewards, lengths, better_answers(np.zeros((4, 2)), valid, by_place=True))
    assert (metrics["n"], metrics["comparisons"]) == (3, 3)
    np.testing.assert_allclose([metrics["accuracy"], metrics["margin"]], [1.5 / 3, 1 / 3])
    assert metrics["score"] == metrics["accuracy"] and metrics["accuracy_low"] <= 0.5 <= metrics["accuracy_high"]
    # Confidences σ(2), σ(1) and 1/2 lie in different bins: |1 - σ(2)| + |0 - σ(1)| + |.5 - .5|, over 3.
    np.testing.assert_allclose(metrics["ece"], (1 - sigmoid(2) + sigmoid(1)) / 3, rtol=1e-9)
    np.testing.assert_allclose(metrics["length_accuracy"], 1 / 3)  # the second alone has a longer chosen side
    assert (metrics["matched_comparisons"], metrics["matched_accuracy"]) == (1, 1.0)  # 10 and 11


def test_rankings_compare_unequal_scores() -> None:
    scores = np.array([[3.0, 1.0, 3.0]])
    better = better_answers(scores, np.ones((1, 3), bool), by_place=False)
    assert np.argwhere(better[0]).tolist() == [[0, 1], [2, 1]]
    metrics = comparison_metrics(np.array([[2.0, 1.0, 0.0]]), np.ones((1, 3)), better)
    assert (metrics["comparisons"], metrics["accuracy"], metrics["margin"]) == (2, 0.5, 0.0)


def test_area_under_the_curve_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    values, positive = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    wins = np.sign(values[positive][:, None] - values[~positive][None, :])
    np.testing.assert_allclose(area_under_curve(values, positive), (wins + 1).mean() / 2)
    metrics = separation_metrics(values, positive)
    assert (
        metrics["accuracy_low"] < metrics["accuracy"] == area_under_curve(values, positive) < metrics["accuracy_high"]
    )


def test_a_calibrated_model_has_no_calibration_error_and_a_sure_one_has() -> None:
    rng = np.random.default_rng(0)
    logits = np.abs(rng.normal(size=40_000))
    right = (rng.random(40_000) < 1 / (1 + np.exp(-logits))).astype(float)
    assert calibration_error(logits, right) < 0.01
    assert calibration_error(10 * logits, right) > 0.2


def test_labelled_prefixes_by_hand() -> None:
    """Right, right, wrong; and one row of a single label that is met. Shares 2/3 and 1."""
    logits = np.array([[2.0, 1.0, 3.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    labels = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    mask = np.array([[True, True, True, False], [True, False, False, False]])
    metrics = label_metrics(logits, labels, mask)
    np.testing.assert_allclose(metrics["accuracy"], (2 / 3 + 1) / 2)
    np.testing.assert_allclose(metrics["auc"], 2 / 4)  # 2 and 1 against 3 and -1
    assert (metrics["n"], metrics["comparisons"]) == (2, 4)


def test_cached_logprobs_find_their_rows() -> None:
    cache = CachedLogprobs(np.array([3, 7, 8]), np.array([0, 2, 2, 5]), np.array([-1.0, -2.0, -3.0, -4.0, -5.0]))
    mask = np.array([[False, True, True, True], [True, True, False, False], [False] * 4])
    found = cache.of(np.array([8, 3, 7]), mask)
    np.testing.assert_array_equal(found, [[0, -3, -4, -5], [-1, -2, 0, 0], [0, 0, 0, 0]])
