"""Checkpoints through Orbax: everything needed to resume bit for bit, written in the background, never half-written."""

import math
import signal
import threading
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from rljax.sharding import fetched
from rljax.types import PyTree

STATE, RECORD, SCORE = "state", "record", "score"


class CheckpointError(ValueError):
    """A checkpoint could not be written, or what was read is not what was written."""


class _Keep:
    """Orbax's preservation policy: the ``latest`` newest checkpoints and the ``best`` ones by score."""

    def __init__(self, latest: int, best: int):
        self.latest, self.best = latest, best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        scores = {c.step: c.metrics[SCORE] for c in checkpoints if c.metrics and c.metrics[SCORE] is not None}
        best = sorted(scores, key=lambda step: (scores[step], step), reverse=True)[: self.best]
        latest = [c.step for c in checkpoints][-self.latest :]
        return [c.step in latest or c.step in best for c in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Does not ask JAX's preemption service: Orbax would, late and with an older step, which upsets its count."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer:
    """Saves and restores (state, position) under ``folder``, a local or ``gs://`` path that all processes share.

    ``state`` is a pytree of arrays, ``position`` a dict that JSON can hold. Every method is called by every process.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 2, keep_best: int = 1, save_every_steps: int = 0):
        if keep < 1 or keep_best < 0 or save_every_steps < 0:
            raise ValueError(
                f"checkpoint.keep={keep} must be 1 or more, keep_best={keep_best} and "
                f"save_every_steps={save_every_steps} 0 or more (0 saves only when asked)"
            )
        path = epath.Path(folder)
        self.folder = path if "://" in str(folder) else path.expanduser().resolve()
        self.save_every_steps = save_every_steps
        self._manager = _Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                best_fn=lambda metrics: -math.inf if metrics[SCORE] is None else metrics[SCORE],
                preservation_policy=_Keep(keep, keep_best),
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def is_due(self, step: int, force: bool = False) -> bool:
        """Whether ``save`` would write something."""
        due = force or (self.save_every_steps > 0 and step % self.save_every_steps == 0)
        return due and step not in self._manager.all_steps()

    def save(
        self, step: int, state: PyTree, position: dict[str, Any], *, score: float | None = None, force: bool = False
    ) -> bool:
        """Copies ``state`` off the devices, writes it in the background; the caller may then donate it.

        Happens every ``save_every_steps`` or by ``force``, once for a step; says whether it did. ``score`` (higher is
        better, NaN is none) ranks the checkpoint for keep-best. An earlier save that failed raises here.
        """
        if not self.is_due(step, force):
            return False
        record = {"position": position, "leaves": _leaves(state, _checksums(state))}
        metrics = {SCORE: None if score is None or math.isnan(score) else float(score)}
        args = ocp.args.Composite(
            **{STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(record)}  # type: ignore[arg-type]
        )
        try:
            return self._manager.save(step, args=args, metrics=metrics, force=True)
        except Exception as error:
            raise self._write_error(error) from error

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """The state and position of ``step`` (default: the latest), placed as ``abstract_state`` says, bit for bit.

        ``abstract_state`` holds ``jax.ShapeDtypeStruct`` leaves with shardings; they need not be those of the save.
        Shapes and dtypes that differ, missing files and changed bits raise CheckpointError.
        """
        step = self._existing(step)
        record = self._read_record(step)
        saved = record["leaves"]
        self._check_leaves(step, saved, abstract_state)
        try:
            args = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract_state)})  # type: ignore[arg-type]
            state = self._manager.restore(step, args=args)[STATE]
        except Exception as error:
            raise self._damaged(step, error) from error
        found = _leaves(state, _checksums(state))
        changed = [name for name, leaf in found.items() if leaf != saved[name]]
        if changed:
            raise self._damaged(step, f"the bytes of {changed[0]} are not those that were saved")
        return state, record["position"]

    def position(self, step: int | None = None) -> dict[str, Any]:
        """The position of ``step`` (default: the latest) without its state."""
        return self._read_record(self._existing(step))["position"]

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest complete checkpoint; one whose writing was cut off does not count."""
        return max(self.steps(), default=None)

    def best(self) -> tuple[float, int] | None:
        """Score and step of the checkpoint with the highest score, the later of equals; None if none has a score."""
        scores = {step: metrics[SCORE] for step in self.steps() if (metrics := self._manager.metrics(step))}
        return max(((score, step) for step, score in scores.items() if score is not None), default=None)

    def delete_after(self, step: int) -> None:
        """Removes what is newer than ``step``: for a run that goes on from an older checkpoint."""
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)

    def wait(self) -> None:
        """Returns when everything saved so far is complete on disk."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Waits, then lets go of threads."""
        self.wait()
        self._manager.close()

    def _existing(self, step: int | None) -> int:
        self.wait()
        step = self.latest_step() if step is None else step
        if step is None or step not in self.steps():
            raise CheckpointError(f"no checkpoint of step {step} under {self.folder}; it has steps {self.steps()}")
        return step

    def _read_record(self, step: int) -> dict[str, Any]:
        try:
            record = self._manager.restore(step, args=ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()}))[RECORD]
            return {"position": record["position"], "leaves": record["leaves"]}
        except Exception as error:
            raise self._damaged(step, error) from error

    def _check_leaves(self, step: int, saved: dict[str, list], abstract_state: PyTree) -> None:
        wanted = _leaves(abstract_state)
        for name in {**saved, **wanted}:
            have, want = saved.get(name, ["missing"])[:2], wanted.get(name, ["missing"])[:2]
            if have != want:
                raise CheckpointError(
                    f"checkpoint {self.folder / str(step)} does not fit this run: {name} is {' '.join(map(str, have))} "
                    f"there and {' '.join(map(str, want))} here; use the config it was saved with or a new output_dir"
                )

    def _damaged(self, step: int, reason: Exception | str) -> CheckpointError:
        earlier = max((s for s in self.steps() if s < step), default=None)
        offer = "there is no earlier one" if earlier is None else f"delete it to go on from step {earlier}"
        return CheckpointError(f"checkpoint {self.folder / str(step)} is damaged ({_first_line(reason)}); {offer}")

    def _write_error(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder} ({_first_line(error)}); the latest complete one "
            f"is of step {self.latest_step()}"
        )


class Preemption:
    """Whether SIGTERM asked the run to save and leave: the same answer for the same step on every process.

    With ``jax.distributed`` JAX's preemption service listens, and one signalled process is enough; it picks a step that
    no process has passed. Without, a handler of ours listens while the ``with`` block lasts.
    """

    def __init__(self) -> None:
        self._signalled = threading.Event()
        self._previous: Any = None

    def __enter__(self) -> Self:
        if not jax.distributed.is_initialized():
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._signalled.set())
        return self

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Call once at every step, with steps that rise by one: the service counts on it."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signalled.is_set()


def _first_line(reason: Exception | str) -> str:
    text = str(reason).strip() or type(reason).__name__
    if "No space left" in text or "RESOURCE_EXHAUSTED" in text:
        return "no space left on the device"
    return text.splitlines()[0][:200]


def _leaves(state: PyTree, checksums: PyTree | None = None) -> dict[str, list]:
    """Path -> [dtype, shape, checksum] of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    sums = [None] * len(leaves) if checksums is None else [int(x) for x in jax.tree.leaves(checksums)]
    return {
        jax.tree_util.keystr(path): [str(leaf.dtype), list(leaf.shape), total]
        for (path, leaf), total in zip(leaves, sums, strict=True)
    }


@jax.jit  # without it every leaf would be copied whole
def _checksums(state: PyTree) -> PyTree:
    """The sum of each leaf's bits as unsigned words, modulo 2³²: the same for every sharding, changed by any one flip.

    Orbax reads a flipped byte of array data back without complaint.
    """

    def checksum(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if jax.typeof(x).memory_space == jax.memory.Space.Host:
            x = fetched(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
        return jnp.sum(words, dtype=jnp.uint32)

    return jax.tree.map(checksum, state)
