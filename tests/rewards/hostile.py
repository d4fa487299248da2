"""Rewards that misbehave on purpose. A module of its own: child processes import them by name."""

import os
import signal
import sys
import time

from rljax.rewards.base import Sample, Score


def hostile(sample: Sample) -> float | Score | None:
    """Does what the completion says; a number is its own value."""
    match sample.completion:
        case "sleep":
            time.sleep(10_000)
        case "raise":
            raise KeyError("no such\nthing")
        case "exit":
            sys.exit(3)
        case "nan":
            return float("nan")
        case "inf":
            return float("inf")
        case "none":
            return None
        case "print":
            print("noise on the standard output " * 5000)
            return 1.0
        case "os._exit":
            os._exit(7)
        case "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "pid":
            return float(os.getpid())
    return float(sample.completion)


def length(prompt: str, completion: str) -> Score:
    """A second reward that always works."""
    return Score(len(completion), correct=len(completion) < 3, answer=completion.upper(), parts={"half": 0.5})


class GroupSize:
    """A reward over whole groups."""

    def batch(self, samples: list[Sample]) -> list[float]:
        return [sum(other.group_id == sample.group_id for other in samples) for sample in samples]


class BatchRaises:
    """A judge that is down."""

    def batch(self, samples: list[Sample]) -> list[float]:
        raise ConnectionError("judge is down")
