"""Truth 5: one device is any mesh, to 1e-9 in float64 over three steps of GRPO with KL, and to rounding in float32."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from rljax.compiles import CompileCounter
from rljax.data.batches import DataPosition
from rljax.packing import make_packing
from rljax.sharding import gather
from rljax.stage_steps import online_step
from tests.truths import KEEP_GRADIENT, digit_share, main_stage, relative_error, tiny_session

# Training mesh, decode mesh and pieces of a rollout; 4 query heads on 2 kv heads, which tensor 4 has to repeat.
MESHES = [("1,8,1", "4,1,2", 1), ("1,2,4", "", 2)]
ALONE: dict[str, Any] = {}  # all 8 rows of a minibatch at once, unpacked
PACKED: dict[str, Any] = {"batch.micro_batch_rows": 4}
CASES = [
    *((*case, ALONE) for case in MESHES),
    ("1,2,2", "", 1, PACKED),
    pytest.param("1,8,1", "", 1, ALONE, marks=pytest.mark.slow),
    pytest.param("2,4,1", "", 1, ALONE, marks=pytest.mark.slow),
    pytest.param("2,2,1", "4,1,1", 2, PACKED, marks=pytest.mark.slow),
]
STEPS = 3
SETTINGS: dict[str, Any] = {"optim.learning_rate": 0.03, "algo.kl_coef": 0.1, "rollout.max_new_tokens": 6}


class Trace(NamedTuple):
    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]
    metrics: list[dict[str, float]]
    compiles: list[int]


def run(mesh: str, decode_mesh: str, steps: int, dtype: str, pieces: int = 1, **batch: Any) -> Trace:
    settings = {**SETTINGS, "rollout.pieces": pieces, **batch}
    session = tiny_session(mesh, decode_mesh=decode_mesh, compute_dtype=dtype, **settings)
    stage = main_stage(session, digit_share)
    state, position, trace = stage.start({"policy": session.base_params()}), DataPosition(), Trace([], [], [], [])
    counter = CompileCounter()
    for step in range(steps):
        before = counter.count
        state, position, metrics, done = online_step(stage, state, position, step)
        trace.compiles.append(counter.count - before)
        trace.tokens.append(done.host.tokens)
        trace.logprobs.append(done.host.behavior_logprobs)
        trace.metrics.append({name: x for name, x in metrics.items() if name.startswith("train/")})
    counter.close()
    return trace


@pytest.fixture(scope="module")
def alone() -> Trace:
    with jax.enable_x64(True):
        return run("1,1,1", "", STEPS, "float64")


@pytest.mark.parametrize(("mesh", "decode_mesh", "pieces", "batch"), CASES)
def test_three_steps_in_float64(
    alone: Trace, mesh: str, decode_mesh: str, pieces: int, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of rows that each data shard packs by itself are those of one device, which packs nothing."""
    packed = []

    def packing(*arguments: Any) -> Any:
        packed.append(arguments)
        return make_packing(*arguments)

    monkeypatch.setattr("rljax.steps.make_packing", packing)
    with jax.enable_x64(True):
        trace = run(mesh, decode_mesh, STEPS, "float64", pieces, **batch)
    assert bool(packed) == bool(batch)
    for step in range(STEPS):
        np.testing.assert_array_equal(trace.tokens[step], alone.tokens[step])
        np.testing.assert_allclose(trace.logprobs[step], alone.logprobs[step], rtol=0, atol=1e-9)
        assert trace.metrics[step].keys() == alone.metrics[step].keys()
        for name, value in alone.metrics[step].items():
            np.testing.assert_allclose(trace.metrics[step][name], value, rtol=0, atol=1e-9, err_msg=name)
    assert trace.compiles[0] > 0 and not any(trace.compiles[1:])  # truth 6, on every mesh
    losses = [metrics["train/loss"] for metrics in alone.metrics]
    assert len(set(losses)) == STEPS and alone.metrics[-1]["train/kl"] > 1e-3  # there was something to compare


class First(NamedTuple):
    tokens: np.ndarray
    logprobs: np.ndarray
    gradient: Any


def first_rollout(mesh: str, decode_mesh: str = "") -> First:
    """One rollout in float32, its teacher-forced log-probs under the start, and the gradient of its one minibatch."""
    session = tiny_session(mesh, decode_mesh=decode_mesh, **SETTINGS, **{"batch.minibatches": 1})
    stage = main_stage(session, digit_share)
    stage.optimizer = KEEP_GRADIENT
    state, _, _, done = online_step(stage, stage.start({"policy": session.base_params()}), DataPosition(), 0)
    r = done.rollout
    rows = {"tokens": r.tokens, "valid": r.valid, "support": r.support}
    logprobs = stage.program("score_policy", stage.last_head_from)(state.params["policy"], rows)
    gradient = gather(state.opt_state["policy"])
    size = session.tokenizer.vocab_size
    return First(done.host.tokens, gather(logprobs), {**gradient, "embed": gradient["embed"][:size]})


@pytest.fixture(scope="module")
def first() -> First:
    return first_rollout("1,1,1")


@pytest.mark.parametrize(("mesh", "decode_mesh"), [MESHES[0][:2], pytest.param(*MESHES[1][:2], marks=pytest.mark.slow)])
def test_the_first_rollout_and_gradient_in_float32(first: First, mesh: str, decode_mesh: str) -> None:
    mine = first_rollout(mesh, decode_mesh)
    np.testing.assert_array_equal(mine.tokens, first.tokens)
    np.testing.assert_allclose(mine.logprobs, first.logprobs, rtol=0, atol=1e-5)
    assert relative_error(mine.gradient, first.gradient) <= 1e-5
