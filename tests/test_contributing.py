"""CONTRIBUTING's worked example as it stands: one file, one line and one config are a new algorithm that trains."""

import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import algos
from rljax.config import algo_defaults, make_config
from rljax.data.batches import DataPosition
from rljax.session import open_session
from rljax.stage_steps import online_step
from rljax.types import Outputs
from tests.conftest import ROOT
from tests.tiny import tiny_config
from tests.truths import digit_share, main_stage


def blocks() -> dict[str, str]:
    """The page's Python by the file that its first line names."""
    found = re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    return dict(found)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The algorithm's module, registered by the page's own line in a copy of ALGOS that this test throws away."""
    module: Any = types.ModuleType("plain_reinforce")
    exec(blocks()["rljax/algos/plain_reinforce.py"], vars(module))
    line = blocks()["rljax/algos/__init__.py"]
    registry: dict[str, Any] = {}
    exec(line, {"ALGOS": registry, "plain_reinforce": module})
    for name, registered in registry.items():
        monkeypatch.setitem(algos.ALGOS, name, registered)
    return module


def test_its_loss_by_hand(example: Any) -> None:
    """Advantages 1 and -1: the sum of -A·l over the mask is -(-.5 -.25) + (-2) = -1.25."""
    algorithm = example.make(example.Config(), group_size=1, max_new_tokens=2)
    batch = {"advantages": jnp.array([[1.0, 1.0], [-1.0, -1.0]]), "loss_mask": jnp.array([[True, True], [True, False]])}
    outputs = Outputs(logprobs=jnp.array([[-0.5, -0.25], [-2.0, -9.0]]))
    term = algorithm.loss(outputs, batch)["policy"]
    np.testing.assert_allclose(term.numerator, -1.25)
    assert term.denominator == "rows"


def test_its_config_builds(example: Any) -> None:
    page: dict[str, Any] = {}
    exec(blocks()["configs/plain_reinforce.py"], page)
    config = make_config(page["get_config"]())
    assert isinstance(config.algo, example.Config) and config.recipe == ("warm_start", "main")


def test_it_trains(example: Any) -> None:
    """Two steps: the policy moves, and the loss of step 0 is that of the page's formula on what was sampled."""
    config = tiny_config(mesh="1,1,1", recipe=("main",))
    with config.unlocked():
        config.algo = algo_defaults("plain_reinforce")
    config.batch.minibatches = 1
    session = open_session(make_config(config), jax.devices()[:1])
    stage = main_stage(session, digit_share)
    state = stage.start({"policy": session.base_params()})
    before = jax.device_get(state.params["policy"])
    first = online_step(stage, state, DataPosition(), 0)
    done = first.completions
    assert done is not None
    advantages = done.rewards - done.rewards.mean()
    expected = -(advantages * done.host.behavior_logprobs.sum(axis=1)).mean()
    np.testing.assert_allclose(first.metrics["train/loss"], expected, rtol=1e-4)
    second = online_step(stage, first.state, first.position, 1)
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), second.state.params["policy"], before)
    assert any(jax.tree.leaves(moved)) and second.metrics["train/skipped"] == 0
