"""Truth 6: no program compiles after the first step of its kind, and a step in which one does is an error."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.collect import collect
from rljax.compiles import CompileCounter, RecompileError, named
from rljax.config import make_config
from rljax.data.batches import DataPosition
from rljax.packing import Packing, place_rows
from rljax.run import open_training
from rljax.session import open_session
from rljax.stage_steps import online_step
from rljax.stages import Stage
from rljax.steps import TrainState
from rljax.trainer import train
from tests.tiny import tiny_config
from tests.truths import digit_share, main_stage, tiny_session


@pytest.fixture
def counter() -> Any:
    counter = CompileCounter()
    yield counter
    counter.close()


def test_a_changed_shape_in_a_known_kind_of_step_raises(counter: CompileCounter) -> None:
    step = jax.jit(lambda x: 2 * x + 1)
    inputs = {size: jnp.zeros(size) for size in (3, 4)}  # made before anything is counted
    for size, kind in ((3, "a"), (3, "a"), (4, "b"), (4, "b"), (3, "b")):
        before = counter.count
        step(inputs[size])
        counter.check(kind, counter.count - before)
    assert counter.count and counter.seconds > 0
    before = counter.count
    jax.jit(lambda x: 2 * x - 1)(inputs[3])
    with pytest.raises(RecompileError, match=r"1 programs were compiled again in a step of kind a: .*JAX_EXPLAIN"):
        counter.check("a", counter.count - before)


def test_a_program_is_named_while_it_compiles_and_where_it_comes_from() -> None:
    said: list[str] = []
    counter = CompileCounter(said.append)
    step, x = jax.jit(named("update", lambda x: jnp.sin(x) @ x)), jnp.zeros((3, 3))
    step(x)
    step(x)
    jax.jit(lambda x: jnp.cos(x) @ x)(x)  # has no name
    step(jnp.zeros((4, 4)))
    counter.close()
    assert [re.sub(r"[\d.]+ s", "1 s", line) for line in said] == [
        "compiling the update",
        "compiled the update in 1 s",
    ] * 2
    assert counter.count > counter.programs == 2
    with pytest.raises(KeyError):
        named("updates", lambda x: x)


def test_a_program_from_the_persistent_cache_is_said_to_be() -> None:
    said: list[str] = []
    counter = CompileCounter(said.append)
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        for _ in range(2):
            jax.jit(named("rollout", lambda x: jnp.tan(x) @ x - 0.125))(jnp.zeros((3, 3)))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
        counter.close()
    assert [line.endswith("from the cache") for line in said] == [False, False, False, True]


def test_evaluations_and_a_moving_reference_compile_once_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each program is waited for once; one that compiles anew at the last step or in another evaluation is refused."""
    moving = {"reference_ema": 0.9, "reference_reset_steps": 2, "steps": 5, "eval.every_steps": 2, "recipe": ("main",)}
    config = make_config(tiny_config(mesh="1,1,1", output_dir=str(tmp_path / "run"), **moving))
    update_reference = Stage.update_reference

    def compiles_at_last(stage: Stage, state: TrainState, step: int) -> None:
        update_reference(stage, state, step)
        if step == 5:
            jax.jit(lambda x: 5 * x)(np.zeros(7))

    monkeypatch.setattr(Stage, "update_reference", compiles_at_last)
    with open_training(open_session(config, jax.devices()[:1])) as opened:
        with pytest.raises(RecompileError, match=r"1 programs .* in a step of kind \('reference', 0, False\)"):
            train(opened)
        waits = re.findall(r"^compiling (.*)$", capsys.readouterr().out, re.MULTILINE)
        assert waits == ["the evaluation"] * 2 + ["the rollout", "scoring by the reference", "the update"]
        trees = {"policy": opened.load_policy("base")}
        opened.evaluate("dev", trees)
        opened.evaluators["dev"]._prompts_per_batch = 4  # of 8
        with pytest.raises(RecompileError, match=r"1 programs .* in a step of kind \('evaluation', 0, 'dev'"):
            opened.evaluate("dev", trees)


def test_a_closed_counter_counts_no_more() -> None:
    counter = CompileCounter()
    counter.close()
    jax.jit(lambda x: 3 * x)(jnp.zeros(5))
    assert counter.count == 0


@pytest.fixture(scope="module")
def stage() -> tuple[Stage, TrainState]:
    session = tiny_session(**{"optim.learning_rate": 0.03, "batch.epochs": 2, "batch.micro_batch_rows": 4})
    stage = main_stage(session, digit_share)
    return stage, stage.start({"policy": session.base_params()})


def test_a_run_compiles_nothing_after_its_first_step(counter: CompileCounter, stage: tuple[Stage, TrainState]) -> None:
    """Three steps of GRPO, two epochs of two minibatches each, whose rows are packed by lengths that change.

    In every one of them the ratio starts at 1.
    """
    online, state = stage
    places = jax.jit(lambda valid: place_rows(Packing(2, 4, valid.shape[1]), jnp.sum(valid, axis=1)))
    packed = set()
    position, counts = DataPosition(), []
    for step in range(3):
        before = counter.count
        state, position, metrics, done = online_step(online, state, position, step)
        counter.check("online", counter.count - before)
        counts.append(counter.count - before)
        packed.add(tuple(places(done.host.valid[:8]).start.tolist()))  # as a minibatch of these rows would be
        assert abs(np.expm1(metrics["train/first_max_log_ratio"])) <= 1e-5
        assert metrics["train/max_log_ratio"] > 1e-3
        assert metrics["train/optimizer_steps"] == 4 * (step + 1)
    assert counts[0] > 0 and counts[1:] == [0, 0] and len(packed) == 3
    # A rollout of another shape in a step of the same name is what the count is there for.
    wider = dataclasses.replace(online.config.rollout, group_size=4)
    online.config = dataclasses.replace(online.config, rollout=wider)
    before = counter.count
    collect(online, state, position, 3)
    with pytest.raises(RecompileError):
        counter.check("online", counter.count - before)
