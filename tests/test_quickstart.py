"""The quickstart learns, and its controls do not: more text for as long, and rewards that belong to other samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rljax.data.arithmetic import make_rows
from tests.conftest import ROOT


def run(name: str, folder: Path) -> list[dict]:
    """The records of the held-out evaluations: random weights, after the warm start, at the end."""
    command = [sys.executable, "-m", "rljax.main", "--config", f"configs/{name}.py", f"--config.output_dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "eval/score" in record]


@pytest.mark.slow  # three runs of minutes each
def test_grpo_beats_more_text_and_permuted_rewards(tmp_path: Path) -> None:
    learnt = run("quickstart", tmp_path / "quickstart")
    text = run("quickstart_more_text", tmp_path / "more_text")
    permuted = run("quickstart_permuted", tmp_path / "permuted")
    assert all(record["eval/n"] >= 512 for record in (*learnt, *text, *permuted))
    assert learnt[1]["eval/score"] == text[1]["eval/score"] == permuted[1]["eval/score"]  # one warm start
    assert learnt[-1]["eval/score"] >= 0.85
    for control in (text, permuted):
        assert learnt[-1]["eval/score_low"] > control[-1]["eval/score_high"]
    assert permuted[-1]["eval/score"] <= permuted[1]["eval/score_high"]


def test_no_training_problem_is_held_out() -> None:
    options = {"bounds": (2, 4, 9), "guess_share": 0.6}
    sets = [
        {row["prompt"] for row in make_rows(split=split, count=count, **options)}
        for split, count in (("train", 8192), ("dev", 128), ("test", 512))
    ]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
