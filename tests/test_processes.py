"""Truth 5: several processes are one, also when some of them are killed, asked to leave, or fail alone."""

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rljax.peers import DEAD_PEER_S, FAREWELL_S
from tests.tiny import AS_USERS, left_behind, lines, run, start, tiny_command

MAIN = ("rljax.main",)
NO_ENV: dict[str, str] = {}
GRPO_ONLY = {"recipe": ("main",), "data.dev": "", "data.test": "", "steps": 3}
SLOW = {"steps": 40, "eval.every_steps": 10, "checkpoint.every_steps": 3, "reward.names": ("tests.tiny:slow_share",)}


@contextmanager
def two_processes(
    folder: Path,
    modules: Sequence[tuple[str, ...]] = (MAIN, MAIN),
    *,
    output_dirs: Any = (),
    env: Mapping[str, str] = NO_ENV,
    **overrides: Any,
) -> Iterator[list[subprocess.Popen]]:
    """Two processes of one run; ``folder.0.log`` and ``folder.1.log`` are theirs. None outlives the block."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = [
        start(tiny_command(place, module, distributed=f"{address},2,{i}", **overrides), log_of(folder, i), **env)
        for i, (module, place) in enumerate(zip(modules, output_dirs or (folder, folder), strict=True))
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def log_of(folder: Path, index: int) -> Path:
    return folder.with_name(f"{folder.name}.{index}.log")


def logs(folder: Path) -> str:
    return log_of(folder, 0).read_text() + log_of(folder, 1).read_text()


def finish_both(folder: Path, **options: Any) -> None:
    with two_processes(folder, **options) as processes:
        assert [process.wait(timeout=600) for process in processes] == [0, 0], logs(folder)


def wait_for_step(folder: Path, step: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 600
    while not re.search(rf'"step": {step},', text_of(folder / "metrics.jsonl")):
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline, logs(folder)
        time.sleep(0.01)


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def one_process(folder: Path, env: Mapping[str, str] = NO_ENV, **overrides: Any) -> dict[str, Any]:
    log = folder.with_name(f"{folder.name}.log")
    assert run(tiny_command(folder, cpu_devices=2, **overrides), log, **env) == 0, log.read_text()
    return left_behind(folder)


@pytest.mark.parametrize("env", [NO_ENV, pytest.param(AS_USERS, marks=pytest.mark.slow)], ids=["quick", "as_users"])
def test_two_processes_write_what_one_does_and_only_the_first_of_them(tmp_path, env):
    """Every metric, sample and bit of the state; what both wrote would stand there twice."""
    finish_both(tmp_path / "two", env=env, **GRPO_ONLY)
    assert left_behind(tmp_path / "two") == one_process(tmp_path / "one", env, **GRPO_ONLY)
    said = [line for line in log_of(tmp_path / "two", 1).read_text().splitlines() if "[Gloo]" not in line]
    assert said == []


def test_a_folder_that_is_not_shared_is_refused_by_both(tmp_path):
    folder = tmp_path / "run"
    with two_processes(folder, output_dirs=(tmp_path / "a", tmp_path / "b"), **GRPO_ONLY) as processes:
        assert [process.wait(timeout=600) for process in processes] == [2, 2], logs(folder)
    for i, name in enumerate("ab"):
        sentence = (
            f"error: output_dir {tmp_path / name} is not shared: what process 0 writes there, processes [1] do not"
        )
        assert sentence in log_of(folder, i).read_text()
        assert not (tmp_path / name / "metrics.jsonl").exists()


@pytest.mark.slow
def test_held_out_text_is_measured_alike(tmp_path):
    """In calls of 6 rows, the last of which lacks some."""
    supervised = {"recipe": ("main",), "algo.name": "sft", "reward.names": (), "batch.rows": 6, "batch.minibatches": 1}
    finish_both(tmp_path / "two", **supervised, steps=2)
    one = one_process(tmp_path / "one", **supervised, steps=2)
    assert left_behind(tmp_path / "two") == one
    assert [record["eval/n"] for record in one["metrics"] if "eval/nll" in record] == [8, 8]


@pytest.mark.slow
def test_two_processes_pack_rows_alike(tmp_path):
    """Two micro-batches a minibatch, packed by the lengths of what each process's shard holds."""
    packed = {**GRPO_ONLY, "batch.micro_batch_rows": 4}
    finish_both(tmp_path / "two", **packed)
    assert left_behind(tmp_path / "two") == one_process(tmp_path / "one", **packed)


@pytest.mark.slow
def test_with_the_tensor_axis_across_processes(tmp_path):
    finish_both(tmp_path / "two", mesh="1,1,2")
    assert left_behind(tmp_path / "two") == one_process(tmp_path / "one", mesh="1,1,2")


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "owned"), [("1,2,1", (range(8), range(8, 16))), ("1,1,2", (range(16), range(0)))])
def test_a_reward_that_is_not_deterministic_is_the_owners_everywhere(tmp_path, mesh, owned):
    folder, teller = tmp_path / "run", ("tests.tells",)
    finish_both(folder, modules=(teller, teller), mesh=mesh, **{"reward.names": ("tests.tiny:any_number",)})
    told = [
        [json.loads(line) for line in log_of(folder, i).read_text().splitlines() if line.startswith("{")]
        for i in (0, 1)
    ]
    assert len(told[0]) == len(told[1]) == 7
    for step in range(6):
        assert told[0][step]["rewards"] == told[1][step]["rewards"]
        assert [told[i][step]["mine"] for i in (0, 1)] == [list(rows) for rows in owned]
    assert told[0][-1] == told[1][-1] and "weights" in told[0][-1]


@pytest.mark.slow
def test_killed_and_asked_to_leave_two_processes_equal_one_uninterrupted(tmp_path):
    folder = tmp_path / "two"
    with two_processes(folder, **SLOW) as processes:
        wait_for_step(folder, 8, processes)
        for process in processes:
            process.kill()
    # Only the second process gets SIGTERM; JAX's preemption service finds a step that neither has passed.
    with two_processes(folder, (MAIN, ("tests.stops_itself", "asked", "12")), **SLOW) as processes:
        assert [process.wait(timeout=600) for process in processes] == [0, 0], logs(folder)
    left = re.search(r"interrupted: step (\d+) is saved", log_of(folder, 0).read_text())
    assert left and 12 <= int(left[1]) < 43
    assert (folder / "checkpoints" / left[1]).is_dir() and max(record["step"] for record in lines(folder)) == int(
        left[1]
    )
    finish_both(folder, **SLOW)
    assert f"resuming from step {left[1]}" in log_of(folder, 0).read_text()
    assert left_behind(folder) == one_process(tmp_path / "one", **SLOW)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other_in_the_stated_time(tmp_path, victim):
    with two_processes(tmp_path / "run", **{**SLOW, "steps": 100_000}) as processes:
        wait_for_step(tmp_path / "run", 6, processes)
        processes[victim].kill()
        status = processes[1 - victim].wait(timeout=DEAD_PEER_S + 15)  # it may have just been heard of
    assert status != 0


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])
def test_a_process_that_fails_alone_ends_all_in_the_stated_time(tmp_path, broken):
    modules = [("tests.stops_itself", "broken", "6") if i == broken else MAIN for i in (0, 1)]
    with two_processes(tmp_path / "run", modules, **{**SLOW, "steps": 100_000}) as processes:
        wait_for_step(tmp_path / "run", 6, processes)
        statuses = [process.wait(timeout=DEAD_PEER_S + FAREWELL_S + 15) for process in processes]
    assert 0 not in statuses
    assert "broken on purpose" in log_of(tmp_path / "run", broken).read_text()
