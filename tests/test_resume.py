"""A run that was stopped and started again is the run that was not: every metric, every sample, every bit."""

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.profiler import ProfileData

from rljax.checkpoint import CheckpointError
from rljax.config import make_config
from rljax.run import finish, open_training
from rljax.runs import ConfigMismatch
from rljax.session import open_session
from rljax.trainer import train
from tests.saved_states import flip_a_bit, largest_file
from tests.tiny import AS_USERS, left_behind, lines, run, start, tiny_command, tiny_config

# State of every kind: moments of the algorithm, a reference that follows the policy, an epoch that ends amid a batch;
# rollouts in pieces.
EVERYTHING = {
    "rollout.pieces": 2,
    "algo.advantage_std": "running",
    "reference_ema": 0.9,
    "data.train_rows": 40,
    "checkpoint.keep": 3,
}

# Long enough to be hit, a save at every step, and the other kind of reference that moves.
LONG = {
    "steps": 24,
    "stages.warm_start.steps": 10,
    "checkpoint.every_steps": 1,
    "eval.every_steps": 7,
    "reward.names": ("tests.tiny:slow_share",),
    "algo.advantage_std": "running",
    "reference_reset_steps": 2,
}


def resumed_at(log: Path) -> int:
    """The step that a process went on from; 0 for a beginning."""
    return int((re.findall(r"resuming from step (\d+)", log.read_text()) or [0])[-1])


@pytest.fixture(scope="module")
def uninterrupted_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    command = tiny_command(folder / "run", profile_steps="6,7", **EVERYTHING)
    assert run(command, folder / "log") == 0, (folder / "log").read_text()
    return folder / "run"


@pytest.fixture(scope="module")
def uninterrupted(uninterrupted_folder) -> dict[str, Any]:
    return left_behind(uninterrupted_folder)


@pytest.fixture(scope="module")
def asked_to_leave(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run that SIGTERM stopped in step 5, and what it said."""
    folder = tmp_path_factory.mktemp("asked")
    command = tiny_command(folder / "run", ("tests.stops_itself", "asked", "5"), **EVERYTHING)
    assert run(command, folder / "log") == 0, (folder / "log").read_text()
    return folder / "run", (folder / "log").read_text()


def test_a_trace_of_the_steps_asked_for_opens(uninterrupted_folder):
    (file,) = uninterrupted_folder.glob("trace/plugins/profile/*/*.xplane.pb")  # where xprof looks
    events = [
        event.name for plane in ProfileData.from_file(str(file)).planes for line in plane.lines for event in line.events
    ]
    assert sum("online_step" in name for name in events) == 2


def test_rates_by_phase_are_tokens_over_seconds(uninterrupted_folder):
    steps = [record for record in lines(uninterrupted_folder) if "train/reward" in record]
    assert len(steps) == 6
    for r in steps:
        tokens = r["speed/tokens_per_s"] * r["time/step_s"]
        for phase in ("score", "update"):
            np.testing.assert_allclose(r[f"speed/{phase}_tokens_per_s"] * r[f"time/{phase}_s"], tokens, rtol=1e-12)
        sampled = r["speed/rollout_tokens_per_s"] * r["time/rollout_s"]
        np.testing.assert_allclose(sampled, r["train/completion_length"] * 16, rtol=1e-12)  # 8 prompts x 2 samples
        phases = sum(r[f"time/{phase}_s"] for phase in ("rollout", "reward", "score", "update"))
        assert phases <= r["time/step_s"]


def test_a_checkpoint_has_the_score_of_its_own_step_or_none(uninterrupted_folder):
    dev = {record["step"]: record["dev/score"] for record in lines(uninterrupted_folder) if "dev/score" in record}
    kept = {int(path.parts[-3]): path for path in uninterrupted_folder.glob("checkpoints/*/metrics/metrics")}
    assert {6, 8, 9} <= set(kept) and 6 not in dev
    assert {step: json.loads(path.read_text())["score"] for step, path in kept.items()} == {
        step: dev.get(step) for step in kept
    }


def test_killed_and_started_again_equals_uninterrupted(tmp_path, uninterrupted):
    log, came_from = tmp_path / "log", []
    for place, step in (("record", 2), ("stage", 3), ("save", 6), ("record", 8)):
        command = tiny_command(tmp_path / "run", ("tests.stops_itself", place, str(step)), **EVERYTHING)
        assert run(command, log) == -9, log.read_text()
        came_from.append(resumed_at(log))
    assert run(tiny_command(tmp_path / "run", **EVERYTHING), log) == 0, log.read_text()
    came_from.append(resumed_at(log))
    # The first kill came before any checkpoint; whether that of step 6 was complete a kill does not tell.
    assert came_from[:3] == [0, 0, 2] and came_from[3] in (4, 6) and came_from[4] in (4, 6)
    assert left_behind(tmp_path / "run") == uninterrupted
    assert not [path for path in (tmp_path / "run").rglob("*tmp*")]


def test_sigterm_saves_that_step_and_the_same_command_goes_on(tmp_path, asked_to_leave, uninterrupted):
    folder, said = asked_to_leave
    assert "interrupted: step 5 is saved; run the same command to resume" in said
    assert max(record["step"] for record in lines(folder)) == 5
    shutil.copytree(folder, tmp_path / "run")
    assert run(tiny_command(tmp_path / "run", **EVERYTHING), tmp_path / "log") == 0
    assert resumed_at(tmp_path / "log") == 5
    assert left_behind(tmp_path / "run") == uninterrupted


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(tmp_path, asked_to_leave, uninterrupted):
    shutil.copytree(asked_to_leave[0], tmp_path / "run")
    log, checkpoints = tmp_path / "log", tmp_path / "run" / "checkpoints"
    flip_a_bit(largest_file(checkpoints / "5" / "state"))
    assert run(tiny_command(tmp_path / "run", **EVERYTHING), log) == 2
    sentence = log.read_text().splitlines()[-1]
    assert re.fullmatch(
        rf"error: checkpoint {checkpoints}/5 is damaged \(.+\); delete it to go on from step 4", sentence
    )
    shutil.rmtree(checkpoints / "5")
    assert run(tiny_command(tmp_path / "run", **EVERYTHING), log) == 0, log.read_text()
    assert resumed_at(log) == 4
    assert left_behind(tmp_path / "run") == uninterrupted


def test_an_unreadable_record_is_found_before_anything_is_written(tmp_path, asked_to_leave):
    folder = Path(shutil.copytree(asked_to_leave[0], tmp_path / "run"))
    record = folder / "checkpoints" / "5" / "record" / "metadata"
    record.write_bytes(record.read_bytes()[:-9])
    before = (folder / "metrics.jsonl").read_bytes()
    config = make_config(tiny_config(**{"output_dir": str(folder), **EVERYTHING}))
    with pytest.raises(CheckpointError, match=r"checkpoints/5 is damaged \(.+\); delete it to go on from step 4"):
        open_training(open_session(config, jax.devices()[:1]))
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("model.architecture.hidden_size", 64),
        ("data.seed", 1),
        ("data.train_rows", 32),
        ("rollout.group_size", 4),
        ("stages.warm_start.batch.rows", 8),
        ("stages.warm_start.steps", 4),
        ("algo.kl_coef", 0.1),
    ],
)
def test_what_may_not_change_is_refused_by_name(asked_to_leave, key, value):
    folder, _ = asked_to_leave
    before = (folder / "config.json").read_bytes()
    config = make_config(tiny_config(**{"output_dir": str(folder), **EVERYTHING, key: value}))
    with pytest.raises(ConfigMismatch, match=rf"belongs to another run: {key} is .+ there and {value} here"):
        open_training(open_session(config, jax.devices()[:1]))
    assert (folder / "config.json").read_bytes() == before


def test_a_refusal_is_one_sentence_and_exit_code_2(tmp_path, asked_to_leave):
    assert run(tiny_command(asked_to_leave[0], seed=1, **EVERYTHING), tmp_path / "log") == 2
    said = (tmp_path / "log").read_text().splitlines()
    assert len(said) == 1 and said[0].startswith("error: output_dir ") and "seed is 0 there and 1 here" in said[0]


@pytest.fixture(scope="module")
def long_uninterrupted(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("long")
    assert run(tiny_command(folder / "run", **LONG), folder / "log") == 0, (folder / "log").read_text()
    return left_behind(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_equals_uninterrupted(tmp_path, long_uninterrupted, seed):
    moments, metrics, log = np.random.default_rng(seed), tmp_path / "run" / "metrics.jsonl", tmp_path / "log"
    statuses = []
    for _ in range(5):
        process = start(tiny_command(tmp_path / "run", **LONG), log)
        begun = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= begun):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 1))
        process.kill()
        statuses.append(process.wait())
    assert set(statuses) <= {-9, 0} and -9 in statuses
    assert run(tiny_command(tmp_path / "run", **LONG), log) == 0, log.read_text()
    assert left_behind(tmp_path / "run") == long_uninterrupted


@pytest.mark.slow
def test_killed_and_started_again_equals_uninterrupted_as_users_compile_it(tmp_path):
    """The other tests here compile quickly, which is other code."""
    log = tmp_path / "log"
    killed = tiny_command(tmp_path / "cut", ("tests.stops_itself", "record", "8"), **EVERYTHING)
    assert run(killed, log, **AS_USERS) == -9, log.read_text()
    assert run(tiny_command(tmp_path / "cut", **EVERYTHING), log, **AS_USERS) == 0, log.read_text()
    assert resumed_at(log) in (4, 6)
    assert run(tiny_command(tmp_path / "whole", **EVERYTHING), log, **AS_USERS) == 0, log.read_text()
    assert left_behind(tmp_path / "cut") == left_behind(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_may_be_prolonged_and_a_finished_one_asked_again(tmp_path):
    """The last stage's steps are free to change; what it exports is then the longer run's."""
    log, command = tmp_path / "log", tiny_command(tmp_path / "short", steps=6)
    for steps in (3, 6):
        assert run(tiny_command(tmp_path / "short", steps=steps), log) == 0, log.read_text()
    finished = left_behind(tmp_path / "short")
    assert run(command, log) == 0 and left_behind(tmp_path / "short") == finished
    assert run(tiny_command(tmp_path / "whole", steps=6), log) == 0
    assert left_behind(tmp_path / "whole")["policy"] == finished["policy"]


def test_weights_of_a_stage_that_is_trained_again_replace_the_old_ones(tmp_path):
    """A run killed between a stage's weights and its checkpoint may go on with another learning rate."""
    session = open_session(make_config(tiny_config(output_dir=str(tmp_path / "run"))), jax.devices()[:1])
    with open_training(session) as opened:
        before = opened.load_policy("base")
        after = jax.tree.map(lambda x: x + 1, before)
        for policy in (before, after):
            opened.save_stage("main", {"policy": policy})
        jax.tree.map(np.testing.assert_array_equal, opened.load_policy("main"), after)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [("off", "warm_start"), ("warm_start", "off")])
def test_a_stage_without_steps_hands_on_what_it_got(tmp_path, recipe):
    """The same weights come out as from a recipe without it, and no evaluation is made twice."""
    policies = []
    for name, stages in (("with", recipe), ("without", ("warm_start",))):
        config = make_config(tiny_config(recipe=("warm_start",), output_dir=str(tmp_path / name)))
        off = replace(config.stages["warm_start"], steps=0)
        config = replace(config, recipe=stages, stages={**config.stages, "off": off})
        with open_training(open_session(config)) as opened:
            train(opened)
            finish(opened)
        policies.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
        assert [record["step"] for record in lines(tmp_path / name) if "eval/score" in record] == [0, 3]
    assert policies[0] == policies[1]
