"""The learning table is printed from what it kept; what it kept is not run again."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning_table

pytestmark = pytest.mark.fast


def found(*correct: int) -> dict[str, Any]:
    return {"correct": list(correct), "last": {}, "drift": {}}


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


def test_a_verdict_is_that_of_the_paired_difference() -> None:
    start, better = found(*[0, 1] * 100), found(*[1] * 200)
    text, surprises = learning_table.table({0: {"start": start, "grpo": better, "permuted rewards": better}})
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "| 1.000 |" in rows["grpo"] and "| rises |" in rows["grpo"] and "| no change |" in rows["start"]
    assert surprises == ["permuted rewards: rises"]


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_kept_has_every_method(seed: int) -> None:
    folder = Path(learning_table.__file__).parent / "results" / "learning_table"
    kept = json.loads((folder / f"seed-{seed}.json").read_text())
    assert set(kept) == {"start", *learning_table.METHODS}
    assert {len(result["correct"]) for result in kept.values()} == {512}
