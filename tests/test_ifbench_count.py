"""Constraints of IFBench are learnt from their verifiers: held-out prompts, before and after."""

from pathlib import Path

import pytest

from tests.test_quickstart import run


@pytest.mark.slow  # minutes
def test_grpo_learns_to_count(tmp_path: Path) -> None:
    start, warm, learnt = run("ifbench_count", tmp_path / "ifbench_count")
    assert all(record["eval/n"] == 512 for record in (start, warm, learnt))
    assert start["eval/score"] < 0.05
    assert learnt["eval/score_low"] > warm["eval/score_high"] + 0.1
