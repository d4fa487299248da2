"""Rewards that hang, raise, answer NaN or kill their process cost their own sample a stated value and nothing else."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from rljax.rewards.base import Sample, Score, Span
from rljax.rewards.runner import Failure, RewardRunner
from tests.rewards.hostile import BatchRaises, GroupSize, hostile, length

pytestmark = pytest.mark.fast


def samples(*completions):
    return [Sample("", completion) for completion in completions]


def test_weighted_sum_parts_correct_and_answers():
    with RewardRunner([("number", hostile, 2.0), ("length", length, -1.0)], workers=3) as runner:
        scored = runner.score(samples("4", "10", "500"))
    # 2·4 − 1, 2·10 − 2, 2·500 − 3
    assert scored.values == [7.0, 18.0, 997.0]
    assert scored.parts[2] == {"number": 500.0, "length": 3.0, "length/half": 0.5}
    assert scored.correct == [True, True, False]
    assert scored.answers == ["4", "10", "500"]
    assert scored.failures == []


def test_correct_is_none_when_nobody_judges_and_needs_all_who_do():
    def says(correct):
        return lambda sample: Score(0.0, correct)

    for verdicts, expected in [
        ((None, None), None),
        ((True, None), True),
        ((False, True), False),
        ((None, True), True),
    ]:
        with RewardRunner([(str(i), says(v), 1.0) for i, v in enumerate(verdicts)], workers=1) as runner:
            assert runner.score(samples("x")).correct == [expected]


def test_spans_are_weighted():
    def spanned(sample):
        return Score(3.0, spans=(Span(0, 1, 1.0), Span(1, 2, 2.0)))

    with RewardRunner([("steps", spanned, 0.5)], workers=1) as runner:
        scored = runner.score(samples("ab"))
    assert scored.spans == [(Span(0, 1, 0.5), Span(1, 2, 1.0))]
    assert sum(span.value for span in scored.spans[0]) == scored.values[0]


BAD = ["1", "sleep", "2", "raise", "nan", "sleep", "none", "inf", "exit", "print", "3"]
REASONS = [
    (1, "timeout after 2 s"),
    (3, "KeyError: 'no such\\nthing'"),
    (4, "None or nan is no value"),
    (5, "timeout after 2 s"),
    (6, "None or nan is no value"),
    (7, "an infinite value"),
    (8, "SystemExit: 3"),
]


@pytest.mark.parametrize("processes", [False, True])
def test_hanging_raising_and_nan_rewards(processes):
    """Two workers, two rewards that hang for ever: the pool would be dead without replacement."""
    with RewardRunner(
        [("bad", hostile, 2.0), ("length", length, 1.0)],
        workers=2,
        timeout_s=2,
        failed_value=-1.0,
        processes=processes,
    ) as runner:
        scored = runner.score(samples(*BAD))
        failed = {index for index, _ in REASONS}
        good = {0: 1.0, 2: 2.0, 9: 1.0, 10: 3.0}
        assert scored.values == [2 * (-1.0 if i in failed else good[i]) + len(BAD[i]) for i in range(len(BAD))]
        assert scored.failures == [Failure(i, "bad", reason) for i, reason in REASONS]
        assert [scored.correct[i] for i in (0, 1, 10)] == [True, False, True]
        assert runner.abandoned == 2
        assert runner.score(samples("5", "6")).values == [2 * 5 + 1, 2 * 6 + 1]


def test_a_killed_process_is_recorded_and_replaced():
    with RewardRunner([("bad", hostile, 1.0)], workers=2, timeout_s=30, processes=True) as runner:
        scored = runner.score(samples("os._exit", "1", "sigkill", "2", "os._exit", "3"))
        assert scored.values == [0.0, 1.0, 0.0, 2.0, 0.0, 3.0]
        assert [(f.index, f.reason) for f in scored.failures] == [
            (0, "the process ended with exit code 7"),
            (2, "the process was killed by signal SIGKILL"),
            (4, "the process ended with exit code 7"),
        ]
        assert runner.score(samples("4")).values == [4.0]


def test_processes_are_others_and_end_on_close():
    runner = RewardRunner([("bad", hostile, 1.0)], workers=2, timeout_s=30, processes=True)
    pids = {int(value) for value in runner.score(samples(*["pid"] * 4)).values}
    assert os.getpid() not in pids
    runner.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert runner.score(samples("1")).failures == [Failure(0, "bad", "no worker is left: the runner is closed")]


def test_batch_rewards_see_all_samples_and_fail_as_one():
    group = [Sample("", str(i), group_id=i // 3) for i in range(5)]
    with RewardRunner([("size", GroupSize(), 1.0), ("judge", BatchRaises(), 1.0)], workers=2) as runner:
        scored = runner.score(group)
        assert scored.values == [3.0, 3.0, 3.0, 2.0, 2.0]
        assert scored.failures == [Failure(i, "judge", "ConnectionError: judge is down") for i in range(5)]
        assert runner.score([]).values == []


def test_order_does_not_depend_on_speed_or_workers():
    def slow_first(sample):
        time.sleep(0.05 if sample.completion == "0" else 0)
        return float(sample.completion)

    many = samples(*map(str, range(40)))
    for workers in (1, 8):
        with RewardRunner([("slow", slow_first, 1.0)], workers=workers) as runner:
            assert runner.score(many).values == [float(i) for i in range(40)]


def test_two_callers_at_once():
    with RewardRunner([("number", hostile, 1.0)], workers=2) as runner:
        results = {}
        threads = [
            threading.Thread(target=lambda k=k: results.update({k: runner.score(samples(*[str(k)] * 50)).values}))
            for k in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {k: [float(k)] * 50 for k in range(4)}


@pytest.mark.parametrize("processes", [False, True])
def test_a_hanging_reward_does_not_keep_the_interpreter(processes):
    """Left without closing, one call still asleep in a thread or idle processes behind: the program ends by itself."""
    program = f"""
        from rljax.rewards.base import Sample
        from rljax.rewards.runner import RewardRunner
        from tests.rewards.hostile import hostile
        runner = RewardRunner([("bad", hostile, 1.0)], workers=2, timeout_s=1.0, processes={processes})
        print(runner.score([Sample("", "sleep"), Sample("", "1")]).values)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0.0, 1.0]\n", "")


@pytest.mark.slow
def test_a_hanging_child_of_a_killed_parent_ends_by_itself(tmp_path):
    program = f"""
        import os, subprocess, sys
        from rljax.rewards.base import Sample
        from rljax.rewards.runner import RewardRunner
        from tests.rewards.hostile import hostile
        runner = RewardRunner([("bad", hostile, 1.0)], workers=1, timeout_s=1.0, processes=True)
        pid = int(runner.score([Sample("", "pid")]).values[0])
        open({str(tmp_path / "pid")!r}, "w").write(str(pid))
        import threading
        threading.Timer(0.3, lambda: os.kill(os.getpid(), 9)).start()
        runner.score([Sample("", "sleep")])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)  # asleep in its reward still
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return  # ended; in a container nobody may reap it
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_check_names_the_reward_and_the_column():
    def needs_answer(prompt, completion, answer):
        return 0.0

    with RewardRunner([("exact", needs_answer, 1.0)], workers=1) as runner:
        runner.check(Sample("", "", row={"answer": 1}))
        with pytest.raises(ValueError, match=r"'exact' fails on a row of the data: .*needs the column 'answer'"):
            runner.check(Sample("", "", row={"target": 1}))


def test_mistakes_are_one_sentence():
    def of(**kwargs):
        return RewardRunner([("a", hostile, 1.0)], **kwargs)

    with pytest.raises(ValueError, match="one name each"):
        RewardRunner([("a", hostile, 1.0), ("a", length, 1.0)])
    with pytest.raises(ValueError, match="at least one reward"):
        RewardRunner([])
    with pytest.raises(ValueError, match="must be finite"):
        of(failed_value=float("nan"))
    with pytest.raises(ValueError, match="timeout_s positive"):
        of(timeout_s=0)
    with pytest.raises(ValueError, match=r"cannot be sent to a process .*define it at the top of a module"):
        RewardRunner([("a", lambda sample: 0.0, 1.0)], processes=True)


def test_a_reward_of_the_main_program_is_refused_in_processes(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "from rljax.rewards.runner import RewardRunner\n"
        "def mine(sample): return 0.0\n"
        "RewardRunner([('mine', mine, 1.0)], workers=1, processes=True)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ValueError: a reward process cannot work: AttributeError" in done.stderr
