"""A reward model learns a verifier's verdict and a hidden linear truth well enough to choose by."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import lines, run, tiny_command


@pytest.mark.slow
@pytest.mark.parametrize("truth", ["verifier", "linear"])
def test_held_out_samples_are_ordered_and_the_pick_gets_better_with_n(truth: str, tmp_path: Path) -> None:
    """The numbers of LOG.md, from 2026-11-28 on: of 160 problems that no training row shares, 16 samples each."""
    folder, log = tmp_path / "run", tmp_path / "log"
    command = tiny_command(folder)
    command[command.index("tests/configs/tiny.py")] = f"configs/arithmetic_reward_model.py:{truth}"
    assert run(command, log, XLA_FLAGS="") == 0, log.read_text()
    final: dict[str, Any] = [record for record in lines(folder) if "eval/sample_accuracy" in record][-1]
    assert final["eval/sample_accuracy"] >= 0.9
    best = [final[f"eval/best_of_{n}"] for n in (1, 2, 4, 8, 16)]
    assert all(more > fewer for fewer, more in itertools.pairwise(best)), best
