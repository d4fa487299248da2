"""A mistake that turns out only while a run is under way is one sentence with exit code 2, too."""

import errno
import os
import re
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import pytest

import rljax.main
import rljax.models.hf_export
import rljax.reference
from rljax.main import main
from tests.tiny import ROOT

TINY = [
    *("rljax.main", "--config", str(ROOT / "tests" / "configs" / "tiny.py"), "--config.compilation_cache=off"),
    *("--config.recipe=main", "--config.steps=0"),  # all that stands around the steps
    *("--config.data.dev=", "--config.data.dev_rows=0", "--config.data.test=", "--config.data.test_rows=0"),
]
PAIRS = [
    *("--config.algo.name=dpo", "--config.algo.beta=0.1", "--config.batch.rows=16"),
    "--config.data.train=arithmetic_pairs",
]


def no_space(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def said(tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """The sentence that the tiny run ends with."""
    session = rljax.main.open_session
    monkeypatch.setattr(rljax.main, "start_devices", lambda config: None)
    monkeypatch.setattr(rljax.main, "open_session", lambda config: session(config, jax.devices()[:1]))

    def run(*flags: str) -> str:
        assert main([*TINY, f"--config.output_dir={tmp_path / 'run'}", *flags]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", error), error
        return error

    return run


def test_a_disk_that_is_full_at_the_export(said, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rljax.models.hf_export, "_write_safetensors", no_space)
    assert f"no space left to write {tmp_path / 'run'}; free some and start the same command again" in said()
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob(".model*"))


def test_a_disk_that_is_full_at_the_reference_s_cache(said, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rljax.reference.np, "savez", no_space)
    assert f"no space left to write {tmp_path / 'run'}; free some" in said(*PAIRS)


def test_a_folder_that_stands_where_the_model_goes(said, tmp_path) -> None:
    assert main([*TINY, f"--config.output_dir={tmp_path / 'run'}", "--config.checkpoint.export=False"]) == 0
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "notes.txt").touch()
    assert f"{tmp_path / 'run' / 'model'} exists and is no model folder; name another or move it away" in said()


def test_samples_of_which_a_select_leaves_none(said) -> None:
    later = ["data.train=rollouts:main", "select.rule=correct"]
    flags = ["--config.recipe=main,warm_start", *(f"--config.stages.warm_start.{flag}" for flag in later)]
    assert "select.rule 'correct' leaves no row of 0 samples" in said(*flags)
