"""Stages on what earlier stages sampled: what is kept, where training starts, and what a resumed run checks."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rljax.checkpoint import CheckpointError
from rljax.config import ConfigError, make_config
from rljax.data.select import rows_hash
from rljax.run import Run, finish, open_training
from rljax.samples import selected_rows
from rljax.session import Session, open_session
from rljax.trainer import train
from tests.configs import expert_iteration
from tests.tiny import even_share, left_behind, lines, run, tiny_command


def tiny_session(folder: Path, **overrides: Any) -> Session:
    config = expert_iteration.get_config()
    config.output_dir = str(folder)
    config.update_from_flattened_dict(overrides)
    return open_session(make_config(config), jax.devices()[:1])


def leave_at(opened: Run, step: int) -> None:
    """As if SIGTERM came in that step."""
    opened.preemption.reached = lambda now: now == step  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, dict[str, Any]]:
    """A whole run whose second fine-tuning has learning rate 0, and its last position."""
    session = tiny_session(tmp_path_factory.mktemp("samples"), **{"stages.learn_2.optim.learning_rate": 0.0})
    with open_training(session) as opened:
        train(opened)
        finish(opened)
        position = opened.progress.to_json()
    return session, position


def samples_of(session: Session, stage: str) -> list[dict[str, Any]]:
    return lines(session.folder, f"stages/{stage}/rows.jsonl")


def test_every_completion_is_kept_with_its_reward(done: tuple[Session, dict]) -> None:
    session, _ = done
    for stage, steps in (("sample_1", (1, 2)), ("sample_2", (5, 6))):
        found = samples_of(session, stage)
        assert [row["step"] for row in found] == [step for step in steps for _ in range(16)]
        for row in found:
            expected = even_share("", row["completion"])
            assert (row["reward"], row["correct"]) == (pytest.approx(expected.value), expected.correct)
            assert session.tokenizer.decode(row["ids"]) == row["completion"]
            assert row["finished"] == (row["ids"][-1] in session.tokenizer.end_ids)
        groups = {row["group"]: row["row"]["prompt"] for row in found}
        assert len(groups) == 16 and all(groups[row["group"]] == row["row"]["prompt"] for row in found)
    assert not (session.folder / "stages" / "learn_1" / "rows.jsonl").exists()


def test_the_rows_of_a_stage_are_those_of_its_union(done: tuple[Session, dict]) -> None:
    session, position = done
    rows = {name: selected_rows(session, session.config.stage(name)) for name in ("learn_1", "learn_2")}
    assert position["selected"] == {name: rows_hash(found) for name, found in rows.items()}
    right = [
        (row["row"]["prompt"], " ".join(row["completion"].split()))
        for stage in ("sample_1", "sample_2")
        for row in samples_of(session, stage)
        if row["correct"] and row["finished"]
    ]
    assert {(row["prompt"], row["solution"]) for row in rows["learn_2"]} == set(right)
    assert len(rows["learn_2"]) == len(set(right)) > len(rows["learn_1"]) > 0


def test_each_round_starts_from_the_base(done: tuple[Session, dict]) -> None:
    """The second fine-tuning has learning rate 0: what it leaves is the base to the bit, though the first one moved."""
    session, _ = done
    with open_training(session) as opened:
        base = jax.device_get(session.base_params())
        first, last = (jax.device_get(opened.load_policy(name)) for name in ("learn_1", "learn_2"))
    jax.tree.map(np.testing.assert_array_equal, last, base)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(base), strict=True))


def test_samples_come_from_the_stage_before(done: tuple[Session, dict]) -> None:
    """The second round samples from the first one's result: collecting trains nothing and is nobody's origin."""
    session, _ = done
    texts = [[row["completion"] for row in samples_of(session, stage)] for stage in ("sample_1", "sample_2")]
    shares = [np.mean([even_share("", text).value for text in half]) for half in texts]
    assert texts[0] != texts[1] and shares[1] > shares[0]  # fine-tuned on even digits


@pytest.mark.slow  # compiles a run of its own
def test_a_resumed_stage_refuses_other_rows(tmp_path: Path) -> None:
    session = tiny_session(tmp_path / "run")
    with open_training(session) as opened:
        leave_at(opened, 3)
        train(opened)
    file = Path(session.folder / "stages" / "sample_1" / "rows.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    right = next(row for row in rows if row["correct"] and row["finished"])
    right["completion"] += "2"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (
        open_training(session) as opened,
        pytest.raises(CheckpointError, match="learn_1 began on other rows than sample_1"),
    ):
        train(opened)


@pytest.mark.slow  # three processes
def test_killed_while_sampling_equals_uninterrupted(tmp_path: Path) -> None:
    def command(folder: Path, *module: str) -> list[str]:
        swap = {"tests/configs/tiny.py": "tests/configs/expert_iteration.py"}
        return [swap.get(word, word) for word in tiny_command(folder, module or ("rljax.main",))]

    assert run(command(tmp_path / "whole"), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    for step in ("2", "6", "7"):
        killed = command(tmp_path / "killed", "tests.stops_itself", "record", step)
        assert run(killed, tmp_path / "log") == -9, (tmp_path / "log").read_text()
    assert run(command(tmp_path / "killed"), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "whole")
    for stage in ("sample_1", "sample_2"):
        assert lines(tmp_path / "killed", f"stages/{stage}/rows.jsonl") == lines(
            tmp_path / "whole", f"stages/{stage}/rows.jsonl"
        )


@pytest.mark.fast
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"stages.learn_1.data.train": "rollouts:sample_2"}, "'sample_2' is no stage before this one that samples"),
        ({"stages.learn_2.data.train": "rollouts:learn_1"}, "there are sample_1, sample_2"),
        ({"stages.learn_1.select.rule": "pairs"}, "makes pairs, and config.stages.learn_1.algo takes text"),
        ({"stages.learn_1.select.rule": ""}, "makes nothing"),
        ({"stages.learn_1.data.train": "arithmetic"}, "select.rule is not read"),
        ({"stages.learn_1.select.labels": ("a", "b")}, "labels takes two texts"),
        (
            {"stages.learn_1.select.rule": "returns", "stages.learn_1.select.labels": ("a", "a")},
            "labels takes two texts",
        ),
        ({"stages.learn_1.select.gap": "easy"}, "the rule correct makes none"),
    ],
)
def test_what_cannot_be_selected_is_said_first(overrides: dict[str, Any], sentence: str) -> None:
    config = expert_iteration.get_config()
    with config.unlocked():
        for stage in ("learn_1", "learn_2"):
            config.stages[stage].select.update({"labels": (), "gap": "", **config.stages[stage].select})
    config.update_from_flattened_dict(overrides)
    with pytest.raises(ConfigError, match=sentence):
        make_config(config)
