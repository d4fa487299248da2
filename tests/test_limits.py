"""A run that passes a limit stops evaluated, saved and exported, says why last, and says so again."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

import rljax.main
from rljax.config.fields import LimitConfig
from rljax.limits import RULES, limited, passed_limit
from rljax.main import main
from tests.tiny import ROOT, lines

TINY = [
    *("rljax.main", "--config", str(ROOT / "tests" / "configs" / "tiny.py"), "--config.compilation_cache=off"),
    *("--config.recipe=main", "--config.steps=4", "--config.checkpoint.every_steps=0", "--config.eval.every_steps=0"),
]

BARE = [
    f"--config.{key}"
    for key in ("data.dev=", "data.dev_rows=0", "data.test=", "data.test_rows=0", "checkpoint.export=False")
]


@pytest.fixture
def command(tmp_path, monkeypatch) -> Any:
    """The exit code of the tiny run, in this process and on one of its devices, in a folder of its own."""
    session = rljax.main.open_session
    monkeypatch.setattr(rljax.main, "start_devices", lambda config: None)
    monkeypatch.setattr(rljax.main, "open_session", lambda config: session(config, jax.devices()[:1]))
    return lambda *flags: main([*TINY, f"--config.output_dir={tmp_path / 'run'}", *flags])


def steps_of(folder: Path, key: str) -> list[int]:
    return [record["step"] for record in lines(folder) if key in record]


def test_every_limit_has_a_rule() -> None:
    assert {name for name, _, _ in RULES} | {"bad_steps"} == set(vars(LimitConfig()))


@pytest.mark.fast
@pytest.mark.parametrize(("name", "key", "sign"), RULES)
def test_a_limit_holds_up_to_its_value(name: str, key: str, sign: int) -> None:
    limits = LimitConfig(**{name: 4.0})
    assert passed_limit(limits, 7, 0, {key: 4.0}) == passed_limit(limits, 7, 0, {}) == ""
    assert passed_limit(LimitConfig(), 7, 0, {key: 4.0 + sign}) == ""
    said = passed_limit(limits, 7, 0, limited({key: 4.0 + sign, "train/reward": 1.0}))
    assert said == f"step 7: {key} is {4 + sign}, past config.limits.{name} 4"


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("kl_per_completion=1e-3", "train/kl_per_completion"),
        ("max_completion_length=0.5", "train/completion_length"),
        ("min_completion_length=9", "train/completion_length"),
    ],
)
def test_a_passed_limit_stops_the_run_and_is_said_last(command, tmp_path, capsys, flag, key) -> None:
    """The KL is 0 in the first step, up to rounding, and grows; the lengths are past at once."""
    assert command(f"--config.limits.{flag}", *BARE) == 3
    steps = [record for record in lines(tmp_path / "run") if "train/reward" in record]
    stopped = steps[-1]["step"]
    assert 1 < stopped < 4 if "kl" in flag else stopped == 1
    name, _, value = flag.partition("=")
    reason = f"step {stopped}: {key} is {steps[-1][key]:.4g}, past config.limits.{name} {float(value):g}"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"stopped: {reason}; to go on from here, move that limit"
    assert lines(tmp_path / "run")[-1]["event/text"] == said


def test_a_stopped_run_is_evaluated_saved_and_exported_and_trains_no_further(command, tmp_path, capsys) -> None:
    """In the first stage of two: what is exported is that stage's until the limit is moved, and then the run's."""
    folder, model = tmp_path / "run", tmp_path / "run" / "model" / "model.safetensors"
    first = ["algo.name=grpo", "batch.rows=0", "batch.minibatches=2", "steps=2"]
    flags = ["--config.recipe=warm_start,main", *(f"--config.stages.warm_start.{flag}" for flag in first)]
    past, off = "--config.limits.perplexity=1.01", "--config.limits.perplexity=0"
    assert command(*flags, past, "--config.steps=1") == 3
    exported, before = model.read_bytes(), len(lines(folder))
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("stopped: step 1: train/perplexity is ")
    assert any(line.startswith("stopped: 1 steps, 16 episodes") for line in said)
    assert steps_of(folder, "eval/score") == steps_of(folder, "dev/score") == [0, 1]
    assert [step.name for step in (folder / "checkpoints").iterdir()] == ["1"]
    model.unlink()
    assert command(*flags, past, "--config.steps=1") == 3
    assert capsys.readouterr().out.splitlines()[-1] == said[-1]
    assert model.read_bytes() == exported
    assert [record["phase"] for record in lines(folder)[before:]] == ["event"]
    assert command(*flags, off, "--config.steps=1") == 0
    assert steps_of(folder, "train/reward") == [1, 2, 3]
    assert model.read_bytes() != exported


def test_steps_that_are_not_finite_are_counted_in_a_row_and_stop_the_run(command, tmp_path, capsys) -> None:
    """A learning rate beyond all numbers: its first update leaves weights that are none, and every later step skips."""
    rate = ["--config.optim.learning_rate=1e38", "--config.optim.clip_norm=0"]
    assert command("--config.limits.bad_steps=2", *rate, *BARE) == 3
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("stopped: 2 steps in a row had a loss or a gradient that is not finite (config.limits.bad_")
    skipped = [record["train/skipped"] for record in lines(tmp_path / "run") if "train/reward" in record]
    assert skipped[-2] > 0 and skipped[-1] > 0 and skipped[:-2] == [0] * (len(skipped) - 2)
    newest = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda step: int(step.name))
    record = json.loads((newest / "record" / "metadata").read_text())
    assert record["position"]["bad_steps"] == 2


def test_a_limit_that_is_lowered_stops_a_run_with_its_next_step(command, tmp_path, capsys) -> None:
    """What was saved on the way to the end was not evaluated or exported, so the run goes on until it can be."""
    folder = tmp_path / "run"
    assert command("--config.steps=2", *BARE) == 0
    assert command("--config.steps=4", "--config.limits.max_completion_length=0.5", *BARE) == 3
    assert steps_of(folder, "train/reward") == [1, 2, 3]
    assert capsys.readouterr().out.splitlines()[-1].startswith("stopped: step 3: train/completion_length is ")
