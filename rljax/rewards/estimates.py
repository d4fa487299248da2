"""Statistics of scored samples: pass@k, maj@k, rerank@k, best-of-n, win rates, and bootstrap intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones (arXiv 2107.03374, eq. 1).

    1 − C(n−c, k) / C(n, k): unbiased for k fresh samples. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int | None = None) -> float:
    """Whether the commonest answer of the first k samples (all, if None) is right.

    An answer is compared as text, so in its reward's normal form. None (unparsable) has no vote; if nobody votes, 0.
    Answers tied for first place share the verdict: the result is the share of them that is right, which depends on no
    order. An answer is right if any sample that gave it is.
    """
    answers, correct = _first("maj@k", k, answers, correct)
    votes: dict[str, int] = {}
    right: dict[str, bool] = {}
    for answer, verdict in zip(answers, correct, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
            right[answer] = right.get(answer, False) or bool(verdict)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(right[answer] for answer in winners) / len(winners) if winners else 0.0


def rerank_at_k(scores: Sequence[float], correct: Sequence[bool], k: int | None = None) -> float:
    """Whether the sample with the highest score among the first k is right; samples tied for it share the verdict."""
    scores, correct = _first("rerank@k", k, scores, correct)
    best = [bool(verdict) for score, verdict in zip(scores, correct, strict=True) if score == max(scores)]
    return sum(best) / len(best)


def best_of_n(scores: ArrayLike, n: int, values: ArrayLike | None = None) -> float:
    """Expected value of the best-scored of n samples, from m >= n: the mean over all subsets of n, so unbiased.

    Without ``values`` that is the expected maximum of the scores themselves, Σ_i C(i−1, n−1) / C(m, n) · s_(i) with
    s_(1) <= ... <= s_(m). With ``values`` the best by score is judged by another measure (a reward model selects, the
    true reward counts); equal scores are chosen among at random. Raises ValueError unless 1 <= n <= m.
    """
    scores = np.asarray(scores, np.float64)
    values = scores if values is None else np.asarray(values, np.float64)
    m = len(scores)
    if not 1 <= n <= m or values.shape != scores.shape:
        raise ValueError(f"best-of-n needs 1 <= n <= m and a value a score; got n={n}, m={m}, {values.size} values")
    levels, level_of, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    up_to = np.concatenate([[0], np.cumsum(sizes)])
    # The best is at a level if all n are at or below it, and not all below.
    chance = [(math.comb(up_to[j + 1], n) - math.comb(up_to[j], n)) / math.comb(m, n) for j in range(len(levels))]
    means = np.bincount(level_of, weights=values) / sizes
    return float(np.dot(chance, means))


def win_rates(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
    """Chance that a sample of ours beats one of theirs, by problem: over all pairs of samples, a tie is half a win.

    Both are scores [problems, samples] of the same problems; the numbers of samples may differ. Raises ValueError if
    the numbers of problems do.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.ndim != 2 or theirs.ndim != 2 or len(ours) != len(theirs):
        raise ValueError(f"a win rate needs [problems, samples] of the same problems; got {ours.shape}, {theirs.shape}")
    return (np.sign(ours[:, :, None] - theirs[:, None, :]).mean(axis=(1, 2)) + 1) / 2


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A mean difference and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean over problems; [problems, runs] resamples problems and runs, both.

    The same values and seed give the same interval. Raises ValueError if there are none, or one that is not finite.
    """
    table = np.asarray(values, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise ValueError(f"a bootstrap needs finite values, [problems] or [problems, runs]; got shape {table.shape}")
    rng = np.random.default_rng(seed)
    problems, runs = table.shape
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = table[rng.integers(problems, size=problems)]
        means[i] = drawn.mean() if runs == 1 else drawn[:, rng.integers(runs, size=runs)].mean()
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def with_interval(name: str, values: ArrayLike, *, resamples: int = 10_000) -> dict[str, float]:
    """The mean over problems under ``name``, and the ends of its 95 % bootstrap interval as ``_low`` and ``_high``."""
    low, high = bootstrap_interval(values, resamples=resamples)
    return {name: float(np.asarray(values).mean()), f"{name}_low": low, f"{name}_high": high}


def ratio_with_interval(
    name: str, sums: ArrayLike, counts: ArrayLike, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Σ sums / Σ counts over rows under ``name``, and the ends of its 95 % bootstrap interval over rows.

    A mean over tokens, of rows that have several. Raises ValueError unless every row has a count above 0.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if sums.ndim != 1 or sums.shape != counts.shape or not counts.size or (counts <= 0).any():
        raise ValueError(f"a ratio needs a sum and a count above 0 for every row; got {sums.shape}, {counts.shape}")
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sums), size=len(sums)) for _ in range(resamples))
    low, high = np.quantile([sums[drawn].sum() / counts[drawn].sum() for drawn in draws], [0.025, 0.975])
    return {name: float(sums.sum() / counts.sum()), f"{name}_low": float(low), f"{name}_high": float(high)}


def paired_difference(
    after: ArrayLike, before: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """mean(after − before) over problems with its bootstrap interval: an improvement if that lies above 0.

    Pairing removes how hard the problems are from the spread. Raises ValueError if the shapes differ.
    """
    after, before = np.asarray(after, np.float64), np.asarray(before, np.float64)
    if after.shape != before.shape:
        raise ValueError(f"a paired difference needs the same problems twice; got shapes {after.shape}, {before.shape}")
    low, high = bootstrap_interval(after - before, confidence=confidence, resamples=resamples, seed=seed)
    return Difference(float((after - before).mean()), low, high)


def _first(name: str, k: int | None, samples: Sequence, correct: Sequence[bool]) -> tuple[Sequence, Sequence[bool]]:
    k = len(samples) if k is None else k
    if len(samples) != len(correct) or not 1 <= k <= len(samples):
        raise ValueError(f"{name} needs 1 <= k <= n and a verdict a sample; got k={k}, {len(samples)}, {len(correct)}")
    return samples[:k], correct[:k]
