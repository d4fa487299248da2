"""Bits, dtypes and shardings come back; what does not fit or is damaged is named; SIGTERM without peers."""

import shutil
import signal

import jax
import jax.numpy as jnp
import pytest

from rljax.checkpoint import Checkpointer, CheckpointError, Preemption
from rljax.progress import Progress
from tests.saved_states import NAMED, abstract, assert_same, bits, flip_a_bit, largest_file, make_state, mesh, two_steps


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
        assert checkpointer.best() is None
        for step, score in scores.items():
            checkpointer.save(step, state, {}, score=score, force=True)
    with Checkpointer(tmp_path, keep=2, keep_best=1) as checkpointer:
        assert checkpointer.steps() == [5, 7, 8]
        assert checkpointer.best() == (0.9, 5)
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


def test_sigterm_without_peers_is_remembered_and_the_old_handler_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.reached(1)
        signal.raise_signal(signal.SIGTERM)
        assert preemption.reached(2)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.fast
def test_the_checkpoints_of_another_version_are_refused():
    known = Progress(step=3).to_json()
    assert Progress.from_json(known) == Progress(step=3)
    for other in ({**known, "scores": {}}, {k: v for k, v in known.items() if k != "stopped"}):
        with pytest.raises(CheckpointError, match="another version of rljax wrote the checkpoints"):
            Progress.from_json(other)
