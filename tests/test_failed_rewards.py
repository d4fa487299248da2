"""A reward that raises or hangs does not stop a run, and who reads the run learns of it: which, where and why."""

import time
from pathlib import Path
from typing import Any

import jax
import pytest

from rljax.config import algo_defaults, make_config
from rljax.metric_names import SAMPLES
from rljax.run import open_training
from rljax.session import open_session
from rljax.trainer import train
from tests.tiny import lines, tiny_config


def moody(prompt: str, completion: str) -> float:
    """Raises at four characters or more, but for worked solutions, on which rewards are tried before a run."""
    if len(completion) >= 4 and "#" not in completion:
        raise ValueError(f"{len(completion)} characters")
    return 1.0


def slow(prompt: str, completion: str) -> float:
    """Does not come back within the time of the test where ``moody`` raises."""
    if len(completion) >= 4 and "#" not in completion:
        time.sleep(5)
    return 1.0


@pytest.mark.parametrize("reward", ["moody", "slow"])
def test_failed_rewards_are_written_with_their_reason_and_the_first_is_said(
    tmp_path: Path, capsys: Any, reward: str
) -> None:
    """Two steps of sampling, and the evaluations around them."""
    config = tiny_config(
        recipe=("main",),
        steps=2,
        output_dir=str(tmp_path / "run"),
        **{
            "reward.names": (f"{__name__}:{reward}",),
            "reward.timeout_s": 1.0 if reward == "slow" else 30.0,
            "reward.workers": 16,
        },
        **{"reward.failed_value": -1.0, "data.dev": "", "data.dev_rows": 0},
    )
    config.unlock()
    config.algo = algo_defaults("collect")
    with open_training(open_session(make_config(config), jax.devices()[:1])) as opened:
        train(opened)
    said = capsys.readouterr().out.splitlines()
    folder, name = tmp_path / "run", f"{__name__}:{reward}"
    failed = [record for record in lines(folder, "samples.jsonl") if record["phase"] == "failed"]
    assert all(set(record) == {"step", "phase", *SAMPLES} for record in failed)
    assert {record["reward"] for record in failed} == {-1.0}
    for record in failed:
        length = len(record["completion"])
        right = f"ValueError: {length} characters" if reward == "moody" else "timeout after 1 s"
        assert record["failures"] == {name: right}
    counts = {record["step"]: record["train/reward_failures"] for record in lines(folder) if "train/reward" in record}
    assert set(counts) == {1, 2} and sum(counts.values()) > 0
    for step, count in counts.items():
        assert len([record for record in failed if record["step"] == step]) >= min(count, 8)
        if count:
            first = next(record for record in failed if record["step"] == step)
            (event,) = (
                line
                for line in said
                if line.startswith(f"step {step}: the reward {name!r} failed") and f"{count:g} failed" in line
            )
            assert f"a completion of prompt {first['prompt_id']} ({first['failures'][name]})" in event
            assert event in [record.get("event/text") for record in lines(folder)]
