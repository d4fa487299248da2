"""Scores texts with several named rewards on threads or processes. No reward can stop the run."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rljax.rewards.base import Sample, Score, Span, takes_batch, weighted_sum
from rljax.rewards.pool import Call, Pool


@dataclass(frozen=True)
class Failure:
    """A reward that gave no number for a sample: it raised, did not come back, lost its process, or was not finite."""

    index: int  # of the sample among those scored
    reward: str
    reason: str


class Scored(NamedTuple):
    """What the rewards say of each sample, in the order of the samples."""

    values: list[float]  # the weighted sum over rewards
    parts: list[dict[str, float]]  # each reward's value before its weight, by name, and its parts as name/part
    correct: list[bool | None]  # every reward that judges says right; a failure counts as wrong; None: nobody judges
    answers: list[str | None]  # of the first reward that gives one
    spans: list[tuple[Span, ...]]  # values times the reward's weight
    failures: list[Failure]


def join_scored(parts: Sequence[Scored]) -> Scored:
    """As if the samples of all parts had been scored together, in that order."""
    joined = Scored([], [], [], [], [], [])
    for part in parts:
        moved = part._replace(failures=[replace(f, index=len(joined.values) + f.index) for f in part.failures])
        columns: Any = zip(joined, moved, strict=True)
        joined = Scored(*(one + other for one, other in columns))
    return joined


class RewardRunner:
    """Named, weighted rewards on a pool of workers, as a context manager.

    A reward gets one sample a call, or all of them if it has ``batch``; each call may take ``timeout_s``. Where a
    reward gives no finite number in that time, ``failed_value`` stands for its value, before its weight, and
    ``failures`` says why. Threads suit rewards that compute or wait on a network; ``processes=True`` suits what may
    hang, crash or run strangers' code, and is the only one that can stop it (see ``rljax.rewards.pool``). The result
    depends neither on the number of workers nor on their speed, time-outs aside. Raises ValueError on rewards that
    cannot be called or sent to a process.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[str, Any, float]],
        *,
        workers: int = 4,
        timeout_s: float = 10.0,
        failed_value: float = 0.0,
        processes: bool = False,
    ):
        self.names = tuple(name for name, _, _ in rewards)  # keys of Scored.parts that every sample has
        self._weights = [float(weight) for _, _, weight in rewards]
        self._whole = [takes_batch(reward) for _, reward, _ in rewards]
        self._failed_value = float(failed_value)
        self._lock = threading.Lock()  # one pool, one caller at a time
        if not rewards or len(set(self.names)) < len(self.names):
            raise ValueError(f"rewards need one name each, and at least one reward; got {list(self.names)}")
        if not all(map(math.isfinite, [*self._weights, self._failed_value])):
            raise ValueError(f"weights and failed_value must be finite; got {self._weights} and {failed_value}")
        if workers < 1 or not 0 < timeout_s < math.inf:
            raise ValueError(f"workers must be at least 1 and timeout_s positive; got {workers} and {timeout_s}")
        self._pool = Pool([reward for _, reward, _ in rewards], workers, timeout_s, processes)

    def __enter__(self) -> "RewardRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. A runner that is not closed does not keep the interpreter from leaving."""
        self._pool.close()

    @property
    def abandoned(self) -> int:
        """Calls given up so far. In threads each may still be running: if this grows, use processes."""
        return self._pool.abandoned

    def score(self, samples: Sequence[Sample]) -> Scored:
        """Scores the samples; whatever a reward does, every sample gets a finite value."""
        samples = list(samples)
        calls, places = [], []  # places: the indices of each call's samples
        for reward, whole in enumerate(self._whole):
            groups = [list(range(len(samples)))] if whole and samples else [[i] for i in range(len(samples))]
            places += groups
            calls += [Call(reward, [samples[i] for i in group]) for group in groups]
        with self._lock:
            outcomes = self._pool.run(calls)
        scores: list[list[Score]] = [[] for _ in samples]  # by sample, then in the order of the rewards
        failures: list[Failure] = []
        for call, group, outcome in zip(calls, places, outcomes, strict=True):
            for k, i in enumerate(group):
                score = outcome if isinstance(outcome, str) else _finite(outcome[k])
                if isinstance(score, str):
                    failures.append(Failure(i, self.names[call.reward], score))
                    score = Score(self._failed_value, correct=False)
                scores[i].append(score)
        totals = [weighted_sum(self.names, self._weights, row) for row in scores]
        return Scored(
            values=[total.value for total in totals],
            parts=[dict(total.parts) for total in totals],
            correct=[total.correct for total in totals],
            answers=[total.answer for total in totals],
            spans=[total.spans for total in totals],
            failures=failures,
        )

    def check(self, sample: Sample) -> None:
        """Scores one sample and raises ValueError if a reward fails on it: for a row of each data set, before a run."""
        for failure in self.score([sample]).failures:
            raise ValueError(f"reward {failure.reward!r} fails on a row of the data: {failure.reason}")


def _finite(score: Score) -> Score | str:
    if math.isnan(score.value):
        return "None or nan is no value"
    return score if math.isfinite(score.value) else "an infinite value"
