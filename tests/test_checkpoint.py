"""Bits, dtypes and shardings come back; what is half written or damaged is not used; kills, processes, SIGTERM."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rljax.checkpoint import Checkpointer, CheckpointError, Preemption

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
from tests.test_checkpoint import *
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


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    algo_state: Any


def mesh(*sizes: int):
    return jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def make_state(grid, seed: int = 0, rows: int = 64) -> State:
    def build(key):
        params = {
            "embed": jax.random.normal(key, (rows, 32)),
            "layers": {"norm": jnp.ones((3, 32), jnp.bfloat16) / 3, "scale": jnp.float32(jnp.pi)},
        }
        algo_state = {"mean": jnp.array([jnp.nan, -0.0, jnp.inf]), "seen": jnp.array([True, False]), "key": key}
        return State(jnp.int32(seed), params, optax.adam(1e-3).init(params), algo_state)

    whole = NamedSharding(grid, PartitionSpec())
    shardings = jax.tree.map(lambda _: whole, jax.eval_shape(build, jax.random.key(seed)))
    split = NamedSharding(grid, PartitionSpec("fsdp", "tensor"))
    shardings.params["embed"] = split
    shardings.opt_state[0].mu["embed"] = shardings.opt_state[0].nu["embed"] = split
    return jax.jit(build, out_shardings=shardings)(jax.random.key(seed))


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(tree: Any) -> list[bytes]:
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(tree)]
    leaves = [jax.random.key_data(x) if k else x for x, k in zip(jax.tree.leaves(tree), is_key, strict=True)]
    return [np.asarray(x).tobytes() for x in leaves]


def assert_same(restored: State, expected_bits: list[bytes], template: State) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(template)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert bits(restored) == expected_bits


def test_round_trip_keeps_bits_dtypes_shardings_and_position(tmp_path):
    state = make_state(mesh(4, 2))
    position = {"epoch": 2, "offset": 17, "stage": "rl", "hash": "ab12"}
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.save(7, state, position, force=True)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.position() == position
        restored, found = checkpointer.restore(abstract(state))
    assert found == position
    assert_same(restored, bits(state), state)


def test_restores_onto_another_mesh(tmp_path):
    state, elsewhere = make_state(mesh(4, 2)), make_state(mesh(1, 8), seed=1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, force=True)
        restored, _ = checkpointer.restore(abstract(elsewhere))
    assert_same(restored, bits(state), elsewhere)


def test_state_may_be_donated_right_after_save(tmp_path):
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x if x.dtype == bool else x * 0, s), donate_argnums=0)
    grid = mesh(4, 2)
    state = make_state(grid, rows=1 << 16)._replace(algo_state=())
    template, expected = abstract(state), bits(state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, force=True)
        state = spoil(state)
        jax.block_until_ready(state)
        restored, _ = checkpointer.restore(template)
    assert bits(restored) == expected


def test_saves_when_due_and_each_step_once(tmp_path):
    state = make_state(mesh(8, 1))
    with Checkpointer(tmp_path, keep=9, save_every_steps=3) as checkpointer:
        assert [s for s in range(1, 8) if checkpointer.save(s, state, {})] == [3, 6]
        assert checkpointer.save(7, state, {}, force=True)
        assert not checkpointer.save(7, state, {}, force=True)
        assert not checkpointer.save(6, state, {})
        checkpointer.wait()
        assert checkpointer.steps() == [3, 6, 7]
        checkpointer.delete_after(3)
        assert checkpointer.latest_step() == 3


def test_keeps_the_newest_and_the_best(tmp_path):
    state = make_state(mesh(8, 1))
    scores = {1: 0.1, 2: 0.9, 3: None, 4: float("nan"), 5: 0.9, 6: 0.3, 7: None, 8: None}
    with Checkpointer(tmp_path, keep=2, keep_best=1) as checkpointer:
        assert checkpointer.best_step() is None
        for step, score in scores.items():
            checkpointer.save(step, state, {}, score=score, force=True)
    with Checkpointer(tmp_path, keep=2, keep_best=1) as checkpointer:
        assert checkpointer.steps() == [5, 7, 8]
        assert checkpointer.best_step() == 5
        checkpointer.save(9, state, {}, score=0.95, force=True)
        checkpointer.wait()
        assert checkpointer.steps() == [8, 9]


def test_bad_numbers_and_missing_steps_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint.keep=0 must be 1 or more"):
        Checkpointer(tmp_path, keep=0)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(CheckpointError, match=r"no checkpoint of step None under .*; it has steps \[\]"):
            checkpointer.restore({})


def test_a_full_disk_is_said_in_one_sentence(tmp_path, monkeypatch):
    # The words of a real save onto a full tmpfs of 2 MiB.
    words = 'RESOURCE_EXHAUSTED: Error writing "step/0" in OCDBT database: write failed [OS error 28: No space left]'

    def full(*_, **__):
        raise ValueError(words)

    state = make_state(mesh(8, 1))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, force=True)
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
            with pytest.raises(
                CheckpointError, match=r"\(no space left on the device\); the latest complete one is of step 1"
            ):
                checkpointer.save(2, state, {}, force=True)


def two_steps(folder: Path, state: State) -> None:
    with Checkpointer(folder, keep=2) as checkpointer:
        checkpointer.save(10, state, {"at": 10}, force=True)
        checkpointer.save(20, state, {"at": 20}, force=True)


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


NAMED = r"{}/20 is damaged \(.+\); delete it to go on from step 10"


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: flip_a_bit(largest_file(step)),
        lambda step: shutil.rmtree(step / "record"),
        lambda step: (step / "record" / "metadata").write_text('{"position": {"at"'),
    ],
    ids=["flipped bit", "no record", "half a record"],
)
def test_damaged_checkpoint_is_named_and_the_one_before_offered(tmp_path, damage):
    state = make_state(mesh(4, 2), rows=4096)
    two_steps(tmp_path, state)
    damage(tmp_path / "20")
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match=NAMED.format(tmp_path)):
            checkpointer.restore(abstract(state))
        restored, position = checkpointer.restore(abstract(state), step=10)
    assert position == {"at": 10}
    assert_same(restored, bits(state), state)


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


def test_a_checkpoint_of_another_shape_or_dtype_names_the_leaf(tmp_path):
    state = make_state(mesh(4, 2))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, force=True)
        with pytest.raises(
            CheckpointError, match=r"params\['embed'\] is float32 \[64, 32\] there and float32 \[128, 32\]"
        ):
            checkpointer.restore(abstract(make_state(mesh(4, 2), rows=128)))
        other = abstract(state)
        other.params["layers"]["scale"] = jax.ShapeDtypeStruct((), jnp.bfloat16)
        with pytest.raises(CheckpointError, match=r"\['scale'\] is float32 \[\] there and bfloat16 \[\] here"):
            checkpointer.restore(other)
        other.params["layers"]["scale"] = abstract(state).params["layers"]["scale"]
        other.params["extra"] = jax.ShapeDtypeStruct((), jnp.bfloat16)
        with pytest.raises(CheckpointError, match=r"\['extra'\] is missing there"):
            checkpointer.restore(other)


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


def test_sigterm_without_peers_is_remembered_and_the_old_handler_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.reached(1)
        signal.raise_signal(signal.SIGTERM)
        assert preemption.reached(2)
    assert signal.getsignal(signal.SIGTERM) is before
