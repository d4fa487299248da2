"""The learning table is printed from what it kept; what it kept is not run again."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning_table


def found(*correct: int) -> dict[str, Any]:
    return {"correct": list(correct), "last": {}, "drift": {}}


@pytest.mark.fast
def test_a_seed_is_run_once_and_again_for_methods_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run_seed(seed: int, names: list[str], folder: Path) -> dict[str, Any]:
        ran.append((seed, names))
        return {name: found(seed, 1) for name in ("start", *names)}

    monkeypatch.setattr(learning_table, "run_seed", run_seed)
    for names in (["grpo"], ["grpo"], ["grpo", "dpo"], ["dpo"]):
        results = learning_table.results_of_seed(0, names, tmp_path)
        assert results == {name: found(0, 1) for name in ("start", *names)}
    assert ran == [(0, ["grpo"]), (0, ["grpo", "dpo"])]


@pytest.mark.fast
def test_a_verdict_is_that_of_the_paired_difference() -> None:
    start, better = found(*[0, 1] * 100), found(*[1] * 200)
    text, surprises = learning_table.table({0: {"start": start, "grpo": better, "permuted rewards": better}})
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "| 1.000 |" in rows["grpo"] and "| rises |" in rows["grpo"] and "| no change |" in rows["start"]
    assert surprises == ["permuted rewards: rises"]


def test_in_what_is_kept_every_method_rises_and_no_control_does() -> None:
    folder = Path(learning_table.__file__).parent / "results" / "learning_table"
    names = list(learning_table.METHODS)
    for seed in range(3):
        results = json.loads((folder / f"seed-{seed}.json").read_text())
        assert set(results) == {"start", *names}
        assert {len(result["correct"]) for result in results.values()} == {512}
    kept = {seed: learning_table.results_of_seed(seed, names, folder) for seed in range(3)}
    text, surprises = learning_table.table(kept)
    assert surprises == [] and text.count("| rises |") == len(learning_table.METHODS) - 3
    assert text in (folder.parents[2] / "LOG.md").read_text()
