"""Samples kept for later stages in ``stages/<name>/rows.jsonl``, and the rows selected from them."""

import json
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np
from etils import epath

from rljax.checkpoint import CheckpointError
from rljax.config import Config, StageConfig
from rljax.data.rows import Row, load_rows
from rljax.data.select import prompts_of, rows_hash, select
from rljax.rollouts import Completions
from rljax.run import Run
from rljax.runs import JsonLines
from rljax.session import Session
from rljax.setup import make_source
from rljax.sharding import agree_text


def is_read_later(config: Config, name: str) -> bool:
    return any(name in config.stage(later).sampled_by for later in config.recipe)


class SampleWriter:
    """The file of a stage; the first process writes it, and nobody where no later stage reads it."""

    def __init__(self, run: Run, name: str):
        writes = jax.process_index() == 0 and is_read_later(run.config, name)
        self._session, self._name, self._file = run.session, name, None
        if writes:
            file = _samples_file(run.session, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = JsonLines(file)
            self._file.truncate_after(run.progress.step)

    def write(self, step: int, done: Completions | None) -> None:
        if self._file is not None and done is not None:
            for record in sample_rows(self._session, done, f"{self._name}/{step}"):
                self._file.append({"step": step, **record})

    def flush(self) -> None:
        """As that of the metrics: before a checkpoint, and before a later stage reads the file."""
        if self._file is not None:
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()


def sample_rows(session: Session, done: Completions, step: str) -> list[Row]:
    """Every completion with its prompt's row, its reward and its verdict: the same on every process.

    Rows that only fill a step up are left out.
    """
    host, rows = done.host, []
    for i in np.flatnonzero(host.loss_mask.any(axis=1)).tolist():
        ids = host.tokens[i][host.loss_mask[i]].tolist()
        rows.append(
            {
                "row": done.rows[i],
                "completion": session.tokenizer.decode(ids),
                "ids": ids,
                "reward": float(done.rewards[i]),
                "correct": None if done.correct[i] < 0 else bool(done.correct[i]),
                "finished": bool(done.finished[i]),
                "group": f"{step}/{int(host.group_id[i])}",
            }
        )
    return rows


def read_samples(session: Session, stages: Sequence[str]) -> list[Row]:
    """What these stages sampled, in their order."""
    lines = [line for name in stages for line in _samples_file(session, name).read_text().splitlines()]
    return [json.loads(line) for line in lines]


def selected_rows(session: Session, stage: StageConfig) -> list[Row]:
    """The rows that a stage's ``select`` makes of what its earlier stages sampled. Raises DataError."""
    chosen = {key: value for key, value in vars(stage.select).items() if key != "also"}
    rows = select(read_samples(session, stage.sampled_by), **chosen, seed=stage.data.seed)
    if stage.select.also:
        columns, options = stage.data.columns or None, dict(stage.data.options) or None
        rows += load_rows(stage.select.also, "train", columns=columns, options=options)
    return prompts_of(rows) if stage.is_online else rows


def open_source(run: Run, number: int) -> Any:
    """A stage's data; of a stage on samples made now, of rows whose hash the checkpoint keeps.

    Raises CheckpointError where processes disagree, or a resumed run finds other rows than it began with.
    """
    if run.sources[number] is not None:
        return run.sources[number]
    name = run.config.recipe[number]
    stage = run.config.stage(name)
    rows = selected_rows(run.session, stage)
    found, known = rows_hash(rows), run.progress.selected.get(name)
    if len(set(agree_text(found))) > 1:
        raise CheckpointError(f"stage {name}: processes read different samples; they need one shared output folder")
    if known not in (None, found):
        raise CheckpointError(
            f"stage {name} began on other rows than {' and '.join(stage.sampled_by)} have left now; the files "
            f"rows.jsonl under {run.session.folder / 'stages'} have changed, so start anew in another output_dir"
        )
    run.progress.selected[name] = found
    run.writer.event(run.progress.step, f"{name}: {len(rows)} rows from what {', '.join(stage.sampled_by)} sampled")
    run.sources[number] = make_source(run.session, stage, rows)
    return run.sources[number]


def _samples_file(session: Session, name: str) -> epath.Path:
    return session.folder / "stages" / name / "rows.jsonl"
