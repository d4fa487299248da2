"""The writer of metrics.jsonl and samples.jsonl; only one process writes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from etils import epath

from rljax.console import Console
from rljax.runs import JsonLines
from rljax.trackers import Tracker, open_tracker


class MetricsWriter:
    """Lines of metrics.jsonl and samples.jsonl, the table on the console, and trackers where asked.

    Every process may hold one; where ``is_writer`` is False nothing happens. ``folder`` may be ``gs://``.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        is_writer: bool = True,
        total_steps: int = 0,
        console: bool = True,
        tensorboard: bool = False,
        wandb: bool = False,
        config: Mapping[str, Any] | None = None,
    ):
        self._on = is_writer
        if not is_writer:
            return
        kinds = [kind for kind, asked in (("tensorboard", tensorboard), ("wandb", wandb)) if asked]
        self._trackers: list[Tracker] = [open_tracker(kind, epath.Path(folder), config or {}) for kind in kinds]
        self._metrics = JsonLines(epath.Path(folder) / "metrics.jsonl")
        self._samples = JsonLines(epath.Path(folder) / "samples.jsonl")
        self._console = Console(total_steps, shown=console)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def truncate_after(self, step: int) -> None:
        """Forgets what was written of later steps: called on resume, so that the files hold every step once."""
        if self._on:
            self._metrics.truncate_after(step)
            self._samples.truncate_after(step)
            self._console.start_at(max(step, 0))
            for tracker in self._trackers:
                tracker.start_at(step)

    def write(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        """One record. Values are single numbers or texts; what is not finite is written as null and counted."""
        if not self._on:
            return
        record = {name: _single(name, value) for name, value in metrics.items()}
        bad = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        strict = _strict(record) | ({"nonfinite": len(bad)} if bad else {})
        self._metrics.append({"step": step, "phase": phase, **strict})
        self._console.record(step, record)
        for tracker in self._trackers:
            tracker.log(step, {k: v for k, v in strict.items() if isinstance(v, int | float)})

    def write_samples(self, step: int, phase: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Completions to read, one line each, with the fields of SAMPLES."""
        if self._on:
            for row in rows:
                self._samples.append({"step": step, "phase": phase, **_strict(row)})

    def show_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The first of an evaluation's ``rows`` on the console, for a glance."""
        if self._on:
            self._console.samples(rows)

    def event(self, step: int, text: str) -> None:
        """Something worth a sentence in metrics.jsonl and on the console."""
        if self._on:
            self._metrics.append({"step": step, "phase": "event", "event/text": text})
            self._console.say(text)

    def say(self, text: str) -> None:
        """A line on the console only."""
        if self._on:
            self._console.say(text)

    def has(self, step: int, name: str) -> bool:
        """Whether metrics.jsonl has this metric of this step; False on processes that write nothing."""
        return self._on and any(record["step"] == step and name in record for record in self._metrics.records())

    def flush(self) -> None:
        """On an object store copies the files up; called before a checkpoint, so that no resumed run misses a step."""
        if self._on:
            self._metrics.flush()
            self._samples.flush()

    def close(self) -> None:
        if self._on:
            self._console.close()
            self._metrics.close()
            self._samples.close()
            for tracker in self._trackers:
                tracker.close()


def _single(name: str, value: Any) -> Any:
    if isinstance(value, str) or value is None:
        return value
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"metric {name} has shape {list(array.shape)}; a metric is a single number")
    return array.item()


def _strict(value: Any) -> Any:
    """As strict JSON can hold it: plain numbers, lists and dicts; null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
