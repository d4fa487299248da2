"""What an online algorithm keeps between steps is in the checkpoint: critic, moments, KL coefficient, old policies."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rljax.algos.staleness import Schedule
from rljax.config import make_config
from rljax.metric_names import is_measured
from rljax.run import finish, open_training
from rljax.session import open_session
from rljax.trainer import train
from tests.configs import tiny, tiny_ppo
from tests.tiny import lines


def run(folder: Path, steps: int) -> dict[str, Any]:
    """Trains up to ``steps`` steps of the main stage, from where ``folder`` stands."""
    config = tiny_ppo.get_config()
    config.steps, config.output_dir = steps, str(folder)
    session = open_session(make_config(config), jax.devices()[:1])
    with open_training(session, command=["tests"]) as opened:
        train(opened)
        finish(opened)
        assert opened.trees is not None
        return jax.device_get(opened.trees)


@pytest.mark.slow
def test_two_and_two_steps_are_four(tmp_path: Path, capsys: Any) -> None:
    """Steps 3 and 4 of a run that was closed in between have the bits of one that was not."""
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "halves", 2)
    halves = run(tmp_path / "halves", 4)
    assert set(whole) == {"policy", "critic"}
    jax.tree.map(np.testing.assert_array_equal, halves, whole)
    records = [
        [{k: v for k, v in r.items() if not is_measured(k)} for r in lines(tmp_path / name) if "train/kl_coef" in r]
        for name in ("whole", "halves")
    ]
    assert len(records[0]) == 4
    assert records[0] == records[1]
    assert [r["rollout/staleness"] for r in records[0]] == [0, 2, 2, 2]
    assert len({r["train/kl_coef"] for r in records[0]}) == 4  # it moved
    assert lines(tmp_path / "halves")  # one file, no step twice


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_runs_sample_with_the_versions_of_the_schedule(lag: int, tmp_path: Path, capsys: Any) -> None:
    """20 updates, three runs: what they log is what ``Schedule`` says without them."""
    logs = []
    for seed in range(3):
        config = tiny.get_config()
        config.recipe, config.stages = ("main",), {}
        config.seed, config.steps, config.rollout.lag, config.batch.minibatches = seed, 20, lag, 1
        config.output_dir, config.checkpoint.export = str(tmp_path / f"{seed}"), False
        session = open_session(make_config(config), jax.devices()[:1])
        with open_training(session, command=["tests"]) as opened:
            train(opened)
        logs.append([r["rollout/staleness"] for r in lines(tmp_path / f"{seed}") if "rollout/staleness" in r])
    assert logs == [[Schedule(lag).turn(number).staleness for number in range(20)]] * 3
