"""Checkpoints of processes that are killed, that share one run, that read damaged files."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rljax.checkpoint import Checkpointer
from tests.saved_states import NAMED, abstract, assert_same, bits, flip_a_bit, largest_file, make_state, mesh, two_steps

ROOT = Path(__file__).resolve().parent.parent

WORKERS = """
import os, sys, time
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))
if os.environ.get("PEERS"):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(os.environ["PEERS"], 2, int(os.environ["RANK"]))
from rljax.checkpoint import *
from tests.saved_states import *
job, folder = sys.argv[1], Path(sys.argv[2])

if job == "damaged":
    for part in sorted(folder.iterdir()):
        with Checkpointer(part) as checkpointer:
            try:
                checkpointer.restore(abstract(make_state(mesh(4, 2), rows=4096)))
            except CheckpointError as error:
                print(error)

if job == "save":  # until killed; step s holds make_state(seed=s)
    with Checkpointer(folder) as checkpointer:
        for step in range((checkpointer.latest_step() or 0) + 1, 10_000):
            checkpointer.save(step, make_state(mesh(8, 1), seed=step, rows=1 << 15), {"at": step}, force=True)

if job == "train":  # until somebody signals one of the processes
    with Checkpointer(folder) as checkpointer, Preemption() as preemption:
        for step in range(1, 10_000):
            state = make_state(mesh(4, 2), seed=step)
            if preemption.reached(step):
                checkpointer.save(step, state, {"at": step}, force=True)
                print(f"saved {step}", flush=True)
                break
            print(f"step {step}", flush=True)
            time.sleep(0.05)
    restored, position = Checkpointer(folder).restore(abstract(state))
    same = jax.jit(lambda a, b: jax.numpy.array_equal(a, b))(restored.params["embed"], state.params["embed"])
    print("restored", position["at"], bool(same), flush=True)
"""


@pytest.fixture
def worker() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process with WORKERS' job; none outlives the test."""
    started: list[subprocess.Popen] = []

    def start(job: str, folder: Path, devices: int = 8, **env: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKERS, job, str(folder)],
            cwd=ROOT,
            env={**os.environ, "DEVICES": str(devices), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_unreadable_files_are_named(tmp_path, worker):
    """In a process of its own: Orbax abandons its other reads, which would warn in whatever test comes next."""
    for damage in ("truncate", "unlink", "index"):
        two_steps(tmp_path / damage, make_state(mesh(4, 2), rows=4096))
    os.truncate(largest_file(tmp_path / "truncate" / "20"), 1000)
    largest_file(tmp_path / "unlink" / "20").unlink()
    flip_a_bit(tmp_path / "index" / "20" / "state" / "manifest.ocdbt")
    printed = worker("damaged", tmp_path).communicate(timeout=120)[0]
    for damage in ("truncate", "unlink", "index"):
        assert re.search(NAMED.format(tmp_path / damage), printed), printed


def test_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path, worker):
    half_written = 0
    for _ in range(6):
        process = worker("save", tmp_path)
        started = {p.name for p in tmp_path.iterdir()}
        deadline = time.monotonic() + 60
        while not (new := {p.name for p in tmp_path.iterdir()} - started) or not any("tmp" in n for n in new):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.wait()
        half_written += any("tmp" in p.name for p in tmp_path.iterdir())
        template = make_state(mesh(8, 1), rows=1 << 15)
        with Checkpointer(tmp_path) as checkpointer:
            step = checkpointer.latest_step()
            if step is not None:
                restored, position = checkpointer.restore(abstract(template))
                assert position == {"at": step}
                assert_same(restored, bits(make_state(mesh(8, 1), seed=step, rows=1 << 15)), template)
        if half_written >= 2 and step is not None:
            break
    assert half_written >= 2
    deadline = time.monotonic() + 60  # Orbax removes what was half written in the background
    while any("tmp" in p.name for p in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any("tmp" in p.name for p in tmp_path.iterdir())


def test_one_signalled_process_makes_both_save_at_one_step(tmp_path, worker):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        peers = f"localhost:{probe.getsockname()[1]}"
    processes = [worker("train", tmp_path, devices=4, PEERS=peers, RANK=str(rank)) for rank in (0, 1)]
    while processes[1].stdout.readline() != "step 1\n":  # Gloo prints here too
        assert processes[1].poll() is None
    processes[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=120)[0] for process in processes]
    saved = [re.findall(r"saved (\d+)", text) for text in printed]
    assert len(saved[0]) == 1 and saved[0] == saved[1], printed
    assert all(f"restored {saved[0][0]} True" in text for text in printed), printed
    state = make_state(mesh(8, 1), seed=int(saved[0][0]))
    with Checkpointer(tmp_path) as checkpointer:  # one process with eight devices reads what two with four wrote
        restored, _ = checkpointer.restore(abstract(state))
    assert_same(restored, bits(state), state)
