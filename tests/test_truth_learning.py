"""Truth 10: a tiny run learns, from random weights, what its reward asks for, and without that nothing."""

from typing import Any

import pytest

from rljax.data.batches import DataPosition
from rljax.stage_steps import online_step
from rljax.stages import Stage
from tests.truths import main_stage, tiny_session

STEPS = 25
SETTINGS = {
    "rollout.prompts_per_step": 8,
    "rollout.group_size": 8,
    "rollout.max_new_tokens": 4,
    "batch.minibatches": 1,
    "algo.kl_coef": 0.0,
    "algo.advantage_std": "group",
    "optim.learning_rate": 0.01,
}


def begins_with_7(prompt: str, completion: str) -> float:
    """Chance: one token of the 18."""
    return float(completion.startswith("7"))


def make_stage(**changes: Any) -> Stage:
    return main_stage(tiny_session(**{**SETTINGS, **changes}), begins_with_7)


def learning_curve(stage: Stage) -> list[float]:
    """The mean reward of every step."""
    state, position, curve = stage.start({"policy": stage.session.base_params()}), DataPosition(), []
    for step in range(STEPS):
        state, position, metrics, _ = online_step(stage, state, position, step)
        curve.append(metrics["train/reward"])
    return curve


@pytest.fixture(scope="module")
def stage() -> Stage:
    return make_stage()


@pytest.fixture(scope="module")
def curve(stage: Stage) -> list[float]:
    return learning_curve(stage)


def test_a_run_learns(curve: list[float]) -> None:
    assert sum(curve[:2]) / 2 < 0.2
    assert min(curve[-5:]) > 0.9


@pytest.mark.parametrize("control", [{"optim.learning_rate": 0.0}, {"reward.permute": True}], ids=str)
def test_without_what_it_learns_from_it_does_not(stage: Stage, curve: list[float], control: dict[str, Any]) -> None:
    """At learning rate 0, and with the same rewards dealt out over the batch at random."""
    other = make_stage(**control)
    other.generate = stage.generate  # the same program, compiled already
    still = learning_curve(other)
    assert still[0] == curve[0]  # the same start, the same draws
    assert max(still) < 0.3
