"""int8 weights and caches in rollouts: the same policy on both paths, near the one that is trained, and corrected."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.collect import collect
from rljax.data.batches import DataPosition
from rljax.decoding import Sampling
from rljax.forward import make_score
from rljax.models.decoder import Model
from rljax.models.params import init_params
from rljax.refill_plan import RefillPlan
from rljax.sampler import Generate, make_generate
from rljax.sharding import DECODE_RULES, Layout
from rljax.stage_steps import score
from tests.models.tiny import layout, tiny_model
from tests.test_refill import BUDGET, ENDS, MODEL, WIDTH, requests, same
from tests.truths import digit_share, main_stage, tiny_forward, tiny_session

INT8: dict[str, Any] = {"weights_dtype": "int8", "cache_dtype": "int8"}
# Mean and largest |log-prob of the rounded policy - that of the trained one| of MODEL's tokens.
MEAN_GAP, LARGEST_GAP = 0.01, 0.05


def program(model: Model, mesh: str, plan: RefillPlan | None, **dtypes: Any) -> Generate:
    place = layout(mesh)
    decode = Layout(place.mesh, DECODE_RULES)
    sampling = Sampling(max_new_tokens=BUDGET, end_ids=ENDS)
    return make_generate(model, place, decode, sampling, dtype=jnp.float32, refill=plan, **dtypes)


def rollout(plan: RefillPlan | None, group: int, mesh: str = "1,1,1", model: Model = MODEL) -> Any:
    params = init_params(model, layout(mesh), 0)
    return jax.device_get(program(model, mesh, plan, **INT8)(params, requests(group), jax.random.key(1), np.int32(0)))


@pytest.fixture(scope="module")
def fixed() -> Any:
    return rollout(None, 4)


@pytest.mark.parametrize(("group", "mesh"), [(4, "1,2,2"), pytest.param(1, "1,1,1", marks=pytest.mark.slow)])
def test_refill_gives_what_the_fixed_batch_gives(fixed: Any, group: int, mesh: str) -> None:
    model = MODEL.padded_for(2)
    other = fixed if group == 4 else rollout(None, group)
    same(rollout(RefillPlan(group=group, slots=5), group, mesh, model), other)


def test_half_a_ring_of_whole_numbers_gives_what_the_fixed_batch_gives(
    fixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, values and their scales move to the whole ring together, on each of two data shards."""
    monkeypatch.setattr("rljax.refill_plan.SHORTEST_LAP", BUDGET)
    same(rollout(RefillPlan(group=4, slots=5), 4, "1,2,1"), fixed)


def test_log_probs_are_near_those_of_the_trained_policy(fixed: Any) -> None:
    forward = tiny_forward(MODEL, layout())
    scored = make_score(forward, WIDTH, pieces=1)(
        init_params(MODEL, layout(), 0), {"tokens": fixed.tokens, "valid": fixed.valid}
    )
    gap = np.abs(np.asarray(scored) - fixed.behavior_logprobs)[fixed.loss_mask]
    print(f"\nmean gap {gap.mean():.2g}, largest {gap.max():.2g}")
    assert 1e-5 < gap.mean() <= MEAN_GAP and gap.max() <= LARGEST_GAP


def test_only_what_asks_for_int8_has_any_and_it_takes_less() -> None:
    """Of the same programs: whole numbers of 8 bits, and the temporary bytes of weights and cache."""
    model = tiny_model("llama", num_hidden_layers=8)
    params = init_params(model, layout(), 0)
    plan = RefillPlan(group=4, slots=16, loops=1)
    taken = {}
    for name, dtypes in {"plain": {}, "int8": INT8, "cache": {"cache_dtype": "int8"}}.items():
        lowered = program(model, "1,1,1", plan, **dtypes).lower(params, requests(4), jax.random.key(1), np.int32(0))
        assert ("xi8>" in lowered.as_text()) == (name != "plain")
        taken[name] = lowered.compile().memory_analysis().temp_size_in_bytes
    print(taken)
    # CPUs turn a layer's rows into float32 to multiply them; the other layers' stay as they are.
    assert taken["cache"] < taken["plain"] and taken["int8"] < taken["plain"]


def test_the_gap_is_measured_and_its_weights_are_cut() -> None:
    """Truncated importance weights: proximal over behaviour, cut at 1 here, so that the cut is seen."""
    settings = {"algo.correction": "truncated", "algo.correction_high": 1.0, "algo.kl_coef": 0.0}
    session = tiny_session(**settings, **{f"rollout.{key}": value for key, value in INT8.items()})
    stage = main_stage(session, digit_share)
    state = stage.start({"policy": session.base_params()})
    done, _, _ = collect(stage, state, DataPosition(), 0)
    head_from = done.host.tokens.shape[1] - session.config.rollout.max_new_tokens
    experience, _ = score(stage, state, done, head_from, 0)
    _, batch = stage.algorithm.targets(state.algo_state, experience)
    mask = done.host.loss_mask
    ratio = np.exp(np.asarray(experience.proximal_logprobs) - done.host.behavior_logprobs)[mask]
    assert np.abs(ratio - 1).mean() > 1e-5
    np.testing.assert_allclose(np.asarray(batch["weights"])[mask], np.minimum(ratio, 1.0), rtol=1e-6)
