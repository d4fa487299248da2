"""Workers with a deadline: threads that are abandoned, or processes that are killed, when a call hangs."""

import contextlib
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from rljax.rewards.base import BatchReward, Sample, Score, as_reward, one_line, score_or_reason

START_LIMIT_S = 60  # a child that has not imported its rewards by then is taken for broken


class Call(NamedTuple):
    """One call of one reward."""

    reward: int
    samples: list[Sample]


class _Lost(NamedTuple):
    """The reason of a failure that took the worker with it."""

    reason: str


Outcome = list[Score] | str | _Lost


class _Thread:
    """A daemon thread that answers one call at a time; the interpreter does not wait for it."""

    def __init__(self, functions: Sequence[BatchReward]):
        self._functions = functions
        self._inbox: queue.SimpleQueue[tuple[Call, queue.SimpleQueue] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="reward", daemon=True).start()

    def submit(self, call: Call, outbox: "queue.SimpleQueue[tuple[_Thread, Outcome]]") -> None:
        self._inbox.put((call, outbox))

    def stop(self) -> None:
        """Ends the worker after the call it is in, if that ever returns."""
        self._inbox.put(None)

    def _serve(self) -> None:
        while (item := self._inbox.get()) is not None:
            call, outbox = item
            outbox.put((self, self._answer(call)))

    def _answer(self, call: Call) -> Outcome:
        return score_or_reason(self._functions[call.reward], call.samples)


class _Process(_Thread):
    """A thread that has its calls answered by a child process, which can be killed."""

    def __init__(self, rewards: bytes):
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "rljax.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # so that what the reward starts dies with it
        )
        assert self._child.stdin and self._child.stdout
        self._requests, self._replies = self._child.stdin, self._child.stdout
        self._rewards = rewards
        super().__init__([])

    def wait_until_ready(self) -> str | None:
        """None, or why the child cannot work."""
        try:
            self._requests.write(self._rewards)
            self._requests.flush()
            if not select.select([self._replies], [], [], START_LIMIT_S)[0]:
                return f"it did not start within {START_LIMIT_S} s"
            return pickle.load(self._replies)
        except (EOFError, OSError):
            return self._death()

    def stop(self) -> None:
        super().stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    def _serve(self) -> None:
        super()._serve()
        self._replies.close()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()

    def _answer(self, call: Call) -> Outcome:
        try:
            request = pickle.dumps((call.reward, call.samples))
        except Exception as error:
            return one_line(error)
        try:
            self._requests.write(request)
            self._requests.flush()
            return pickle.load(self._replies)
        except (EOFError, OSError, pickle.UnpicklingError):
            return _Lost(self._death())

    def _death(self) -> str:
        code = self._child.wait()
        how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process {how}"


class Pool:
    """Runs calls of ``rewards`` on ``workers`` threads or processes and gives up on each call after ``timeout_s``.

    A thread cannot be stopped in Python: a hanging one is left behind and replaced, and costs what it goes on using;
    ``abandoned`` counts them. Code that never releases the interpreter lock (a runaway regular expression) holds up the
    whole program in a thread. Processes have neither weakness, cost a copy of each sample, and need rewards that can be
    imported by name (not lambdas, nothing defined in ``__main__``). POSIX only.
    """

    def __init__(self, rewards: Sequence[Any], workers: int, timeout_s: float, processes: bool):
        self._functions = [as_reward(reward) for reward in rewards]
        self._timeout_s = timeout_s
        self._pickled = _pickle_rewards(rewards, timeout_s) if processes else None
        self._size = workers
        self._idle: list[_Thread] = []
        self.abandoned = 0
        reason = self._refill(workers)
        if reason:
            raise ValueError(f"a reward process cannot work: {reason}; mend it or use threads (processes=False)")

    def close(self) -> None:
        """Ends idle workers; after ``run`` has returned there are no others."""
        while self._idle:
            self._idle.pop().stop()
        self._size = 0

    def run(self, calls: Sequence[Call]) -> list[list[Score] | str]:
        """Each call's scores, or the reason why there are none, in the order of the calls."""
        outcomes: list[list[Score] | str] = ["no worker is left"] * len(calls)
        waiting = deque(range(len(calls)))
        running: dict[_Thread, tuple[int, float]] = {}
        outbox: queue.SimpleQueue[tuple[_Thread, Outcome]] = queue.SimpleQueue()
        reason = self._refill(self._size - len(self._idle))
        try:
            while waiting or running:
                while waiting and self._idle:
                    worker = self._idle.pop()
                    running[worker] = (waiting.popleft(), time.monotonic() + self._timeout_s)
                    worker.submit(calls[running[worker][0]], outbox)
                if not running:
                    for index in waiting:
                        outcomes[index] = f"no worker is left: {reason or 'the runner is closed'}"
                    break
                nearest = min(deadline for _, deadline in running.values())
                try:
                    worker, outcome = outbox.get(timeout=max(0.0, nearest - time.monotonic()))
                except queue.Empty:
                    reason = self._give_up_late(running, outcomes) or reason
                    continue
                if worker not in running:  # it came back after its deadline
                    continue
                index, _ = running.pop(worker)
                if isinstance(outcome, _Lost):
                    outcomes[index] = outcome.reason
                    worker.stop()
                    reason = self._refill(1) or reason
                else:
                    outcomes[index] = outcome
                    self._idle.append(worker)
        finally:  # after an interrupt: nobody reads the answers of these any more
            for worker in running:
                worker.stop()
        return outcomes

    def _give_up_late(self, running: dict[_Thread, tuple[int, float]], outcomes: list[list[Score] | str]) -> str | None:
        now = time.monotonic()
        late = [worker for worker, (_, deadline) in running.items() if deadline <= now]
        for worker in late:
            index, _ = running.pop(worker)
            outcomes[index] = f"timeout after {self._timeout_s:g} s"
            worker.stop()
        self.abandoned += len(late)
        return self._refill(len(late))

    def _refill(self, count: int) -> str | None:
        """Adds up to ``count`` workers; the reason of the last that could not start."""
        if self._pickled is None:
            self._idle += [_Thread(self._functions) for _ in range(count)]
            return None
        children = [_Process(self._pickled) for _ in range(count)]
        reason = None
        for child in children:
            trouble = child.wait_until_ready()
            if trouble:
                child.stop()
                reason = trouble
            else:
                self._idle.append(child)
        return reason


def _pickle_rewards(rewards: Sequence[Any], timeout_s: float) -> bytes:
    try:
        return pickle.dumps((list(rewards), timeout_s))
    except Exception as error:
        raise ValueError(
            f"a reward cannot be sent to a process ({one_line(error)}): "
            "define it at the top of a module, or use threads (processes=False)"
        ) from error
