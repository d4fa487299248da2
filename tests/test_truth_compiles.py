"""Truth 6: no program compiles after the first step of its kind, and a step in which one does is an error."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.collect import collect
from rljax.compiles import CompileCounter, RecompileError
from rljax.data.batches import DataPosition
from rljax.stage_steps import online_step
from rljax.stages import Stage
from rljax.steps import TrainState
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
        counter.check(kind, before)
    assert counter.count and counter.seconds > 0
    before = counter.count
    jax.jit(lambda x: 2 * x - 1)(inputs[3])
    with pytest.raises(RecompileError, match=r"1 programs were compiled again in a step of kind a: .*JAX_EXPLAIN"):
        counter.check("a", before)


def test_a_closed_counter_counts_no_more() -> None:
    counter = CompileCounter()
    counter.close()
    jax.jit(lambda x: 3 * x)(jnp.zeros(5))
    assert counter.count == 0


@pytest.fixture(scope="module")
def stage() -> tuple[Stage, TrainState]:
    session = tiny_session(**{"optim.learning_rate": 0.03, "batch.epochs": 2})
    stage = main_stage(session, digit_share)
    return stage, stage.start({"policy": session.base_params()})


def test_a_run_compiles_nothing_after_its_first_step(counter: CompileCounter, stage: tuple[Stage, TrainState]) -> None:
    """Three steps of GRPO, two epochs of two minibatches each; and in every one of them the ratio starts at 1."""
    online, state = stage
    position, counts = DataPosition(), []
    for step in range(3):
        before = counter.count
        state, position, metrics, _ = online_step(online, state, position, step)
        counter.check("online", before)
        counts.append(counter.count - before)
        assert abs(np.expm1(metrics["train/first_max_log_ratio"])) <= 1e-5
        assert metrics["train/max_log_ratio"] > 1e-3
        assert metrics["train/optimizer_steps"] == 4 * (step + 1)
    assert counts[0] > 0 and counts[1:] == [0, 0]
    # A rollout of another shape in a step of the same name is what the count is there for.
    wider = dataclasses.replace(online.config.rollout, group_size=4)
    online.config = dataclasses.replace(online.config, rollout=wider)
    before = counter.count
    collect(online, state, position, 3)
    with pytest.raises(RecompileError):
        counter.check("online", before)
