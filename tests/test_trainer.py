"""When a run saves, and when it uploads its lines."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import rljax.run
from rljax.config import make_config
from rljax.metrics import MetricsWriter
from rljax.run import Run, finish, open_training
from rljax.runs import JsonLines
from rljax.session import open_session
from rljax.trainer import train
from tests.stand_in_bucket import Bucket, played_bucket
from tests.tiny import tiny_config

DEV = {2: 0.5, 4: 0.7, 6: 0.6, 7: 0.1}  # score on dev by step


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Of each upload of metrics.jsonl to a bucket, where the lines of the run lie, the last step that it had."""
    found: list[int] = []
    flush = JsonLines.flush

    def watched(lines: JsonLines) -> None:
        flush(lines)
        if lines.path.name == "metrics.jsonl":
            found.append(max(json.loads(line)["step"] for line in lines.path.read_text().splitlines()))

    monkeypatch.setattr(JsonLines, "flush", watched)
    monkeypatch.setattr(rljax.run, "make_writer", lambda *_: MetricsWriter("gs://bucket/run", total_steps=7))
    with played_bucket():
        yield found
    assert not Bucket.store


def test_the_best_on_dev_is_saved_and_lines_go_up_when_something_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uploads: list[int], capsys: pytest.CaptureFixture
) -> None:
    """Seven steps of fine-tuning, evaluated at every second one; saved at none by ``every_steps``."""
    splits = []

    def evaluate(run: Run, split: str, *_: object) -> float | None:
        splits.append((run.progress.step, split))
        return DEV.get(run.progress.step) if split == "dev" else 0.9

    monkeypatch.setattr(Run, "evaluate", evaluate)
    overrides = {"stages.warm_start.steps": 7, "eval.every_steps": 2, "checkpoint.every_steps": 0}
    overrides |= {"checkpoint.keep": 1, "checkpoint.export": False, "output_dir": str(tmp_path / "run")}
    config = make_config(tiny_config(recipe=("warm_start",), **overrides))
    with open_training(open_session(config, jax.devices()[:1])) as opened:
        train(opened)
        finish(opened)
        assert opened.checkpoints.steps() == [4, 7]
        assert (opened.progress.best_dev, opened.checkpoints.best()) == (0.7, (0.7, 4))
    assert splits == [(0, "test"), (0, "dev"), (2, "dev"), (4, "dev"), (6, "dev"), (7, "dev"), (7, "test")]
    assert uploads == [2, 4, 6, 7, 7]  # the last one as the file is closed
    assert "best on dev: step 4, score 0.700; its checkpoint is kept" in capsys.readouterr().out.splitlines()
