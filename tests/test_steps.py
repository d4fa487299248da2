"""The compiled steps: rows cut and joined, minibatches and epochs, steps that are skipped, frozen copies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax.algos import sft
from rljax.algos.base import Algorithm, Batch
from rljax.forward import make_score
from rljax.models.params import init_params, param_shardings
from rljax.optim import OptimConfig, make_optimizer
from rljax.packing import cut_rows, join_rows, take_rows
from rljax.sharding import to_global
from rljax.steps import TrainState, UpdatePlan, copy_params, init_state, make_divergence, make_update
from rljax.types import Outputs, Term
from tests.models.tiny import layout, tiny_model
from tests.truths import grpo_algorithm, make_gradient, random_batch, relative_error, tiny_forward

MODEL = tiny_model("llama", vocab_size=61, num_hidden_layers=1, hidden_size=16)
PLACE = layout()
P, C, ROWS = 3, 4, 8
OPTIMIZER = make_optimizer({"policy": OptimConfig(learning_rate=1e-2, weight_decay=0.1)}, 10)
GRPO = grpo_algorithm(max_new_tokens=C)


@pytest.fixture
def batch() -> Batch:
    made = random_batch(np.random.default_rng(0), 61, [(3, 4), (1, 2), (2, 3), (3, 1)] * 2, P, C)
    made = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in made.items()}
    # Ratios within the clip, so that every row has a gradient.
    forward = make_score(tiny_forward(MODEL, PLACE), P, pieces=1)
    made["behavior_logprobs"] = np.asarray(forward(init_params(MODEL, PLACE, seed=0), made))
    return made


def start(optimizer: optax.GradientTransformation = OPTIMIZER, algorithm: Algorithm = GRPO) -> TrainState:
    shardings = {"policy": param_shardings(MODEL, PLACE)}
    params = {"policy": init_params(MODEL, PLACE, seed=0)}
    return init_state(params, shardings, optimizer, algorithm.init(), PLACE)


def updater(
    algorithm: Algorithm = GRPO,
    optimizer: Any = OPTIMIZER,
    *,
    epochs: int = 1,
    minibatches: int = 1,
    head_from: int = P,
) -> Any:
    where = jax.tree.map(lambda x: x.sharding, start(optimizer, algorithm))
    plan = UpdatePlan(epochs=epochs, minibatches=minibatches, micro_batches=1, head_from=head_from)
    program = make_update(algorithm, {"policy": tiny_forward(MODEL, PLACE)}, optimizer, plan, where)

    def update(state: TrainState, batch: Batch, seed: int = 0) -> tuple[TrainState, dict[str, np.ndarray]]:
        placed = {name: to_global(x, PLACE.rows) for name, x in batch.items()}
        return jax.device_get(program(state, placed, jax.random.key(seed)))

    return update


@pytest.fixture(scope="module")
def one_step() -> Any:
    return updater()


# -- rows


def test_rows_are_cut_evenly_from_every_shard_and_joined_again() -> None:
    place = layout("2,4,1")
    rows = {"a": np.arange(48).reshape(16, 3), "b": np.arange(16)}
    placed = jax.tree.map(lambda x: to_global(x, place.rows), rows)
    cut = jax.jit(lambda tree: cut_rows(tree, 2, place))(placed)
    assert cut["a"].shape == (2, 8, 3)
    # 8 shards of 2 rows: the first piece takes the first row of each, where it lies.
    np.testing.assert_array_equal(cut["b"], [np.arange(0, 16, 2), np.arange(1, 16, 2)])
    joined = jax.jit(lambda tree: join_rows(tree, place))(cut)
    jax.tree.map(np.testing.assert_array_equal, joined, rows)
    taken = jax.jit(lambda tree: take_rows(tree, jnp.arange(16)[::-1].reshape(2, 8), place))(placed)
    np.testing.assert_array_equal(taken["b"], [np.arange(15, 7, -1), np.arange(7, -1, -1)])
    assert len(taken["b"].addressable_shards[0].data[0]) == 1


def test_a_piece_of_the_rows_at_a_time_scores_the_same(batch: Batch) -> None:
    params = init_params(MODEL, PLACE, seed=0)
    whole, quarters = (make_score(tiny_forward(MODEL, PLACE), P, pieces)(params, batch) for pieces in (1, 4))
    assert not np.asarray(whole)[:, :P].any()
    np.testing.assert_allclose(quarters, whole, rtol=0, atol=1e-6)


# -- minibatches and epochs


def counting(rows: int) -> Algorithm:
    """Its metrics say which rows an optimizer step saw: a bit for each."""

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        return {"seen": Term(jnp.sum(2.0 ** batch["number"]), "", 0.0), "nll": Term(-outputs.logprobs.sum(), "")}

    def prepare(state: Any, batch: Batch, key: Any) -> tuple[Any, Batch, dict]:
        return state, batch, {"": jnp.float32(1)}

    return sft.make(sft.Config(), group_size=1, max_new_tokens=1)._replace(loss=loss, prepare=prepare)


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(batch: Batch) -> None:
    update = updater(counting(ROWS), epochs=3, minibatches=4)
    numbered = {**batch, "number": np.arange(ROWS, dtype=np.float32)}
    state, metrics = update(start(algorithm=counting(ROWS)), numbered)
    seen = metrics["seen"].reshape(3, 4)
    assert int(state.step) == 12
    np.testing.assert_array_equal(seen.sum(axis=1), 2**ROWS - 1)
    assert all(int(x).bit_count() == 2 for x in seen.flat)
    assert len({tuple(sorted(epoch)) for epoch in seen.tolist()}) == 3
    again = update(start(algorithm=counting(ROWS)), numbered)[1]["seen"]
    np.testing.assert_array_equal(again, metrics["seen"])
    other = update(start(algorithm=counting(ROWS)), numbered, seed=1)[1]["seen"]
    assert (other != again).any()


# -- text beside the rollout


def test_the_gradient_of_mixed_text_adds_up(batch: Batch) -> None:
    """PPO-ptx, at a rate of 1 without momentum or clip: a step is GRPO's and half of the text's own."""
    plain = make_optimizer({"policy": OptimConfig(name="sgd", b1=0.0, learning_rate=1.0, clip_norm=0.0)}, 10)
    text = random_batch(np.random.default_rng(1), 61, [(1, 3), (2, 4), (1, 1), (2, 2)] * 2, P, C)
    text = {name: text[name] for name in ("tokens", "valid", "loss_mask")}

    def moved(algorithm: Algorithm, rows: Batch, text: Batch | None = None, coef: float = 0.0) -> Any:
        where = jax.tree.map(lambda x: x.sharding, start(plain, algorithm))
        plan = UpdatePlan(1, 1, 1, head_from=P if algorithm is GRPO else 1, text_coef=coef)
        program = make_update(algorithm, {"policy": tiny_forward(MODEL, PLACE)}, plain, plan, where)
        placed = [{name: to_global(x, PLACE.rows) for name, x in b.items()} for b in (rows, text) if b is not None]
        state, metrics = program(start(plain, algorithm), placed[0], jax.random.key(0), *placed[1:])
        before = start(plain, algorithm).params
        return jax.tree.map(lambda a, b: np.asarray(a - b), state.params, before), jax.device_get(metrics)

    alone, _ = moved(GRPO, batch)
    supervised, read = moved(sft.make(sft.Config(), group_size=1, max_new_tokens=1), text)
    both, metrics = moved(GRPO, batch, text, 0.5)
    expected = jax.tree.map(lambda a, b: a + 0.5 * b, alone, supervised)
    assert relative_error(both, expected) < 1e-5
    assert relative_error(both, alone) > 1e-2
    np.testing.assert_allclose(metrics["text_nll"], read["nll"], rtol=1e-5)


# -- steps that are skipped


def test_a_step_with_a_loss_that_is_not_finite_changes_no_bit_and_is_counted(one_step: Any, batch: Batch) -> None:
    before = jax.device_get(one_step(start(), batch)[0])  # moments that are not 0
    spoilt = {**batch, "advantages": batch["advantages"].copy()}
    spoilt["advantages"][0, P] = np.nan
    after, metrics = one_step(jax.device_put(before, jax.tree.map(lambda x: x.sharding, start())), spoilt)
    assert np.isnan(metrics["loss"][0]) and metrics["skipped"].tolist() == [True]
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert int(before.step) == 1
    moved, metrics = one_step(jax.device_put(before, jax.tree.map(lambda x: x.sharding, start())), batch)
    assert int(moved.step) == 2 and metrics["skipped"].tolist() == [False]
    assert relative_error(moved.params, before.params) > 1e-4


def test_a_gradient_that_is_not_finite_skips_as_well(batch: Batch) -> None:
    """A loss of 0 whose derivative is infinite: sqrt at 0."""

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        nothing = jnp.sum(outputs.logprobs - jax.lax.stop_gradient(outputs.logprobs))
        return {"root": Term(jnp.sqrt(nothing), "tokens")}

    algorithm = sft.make(sft.Config(), group_size=1, max_new_tokens=1)._replace(loss=loss)
    before = jax.device_get(start(algorithm=algorithm))
    after, metrics = updater(algorithm)(start(algorithm=algorithm), batch)
    assert metrics["loss"].tolist() == [0.0] and metrics["skipped"].tolist() == [True]
    assert not np.isfinite(metrics["grad_norm/policy"]).any()
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_the_other_steps_of_the_rollout_are_taken(batch: Batch) -> None:
    spoilt = {**batch, "advantages": batch["advantages"].copy()}
    spoilt["advantages"][0, P] = np.inf
    state, metrics = updater(minibatches=4)(start(), spoilt)
    assert metrics["skipped"].sum() == 1
    assert int(state.step) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


# -- what an optimizer step is


def test_a_step_is_the_optimizer_on_the_gradient(one_step: Any, batch: Batch) -> None:
    params = init_params(MODEL, PLACE, seed=0)
    gradient, _ = make_gradient(GRPO, tiny_forward(MODEL, PLACE), P)(params, batch)
    updates, _ = OPTIMIZER.update({"policy": gradient}, OPTIMIZER.init({"policy": params}), {"policy": params})
    expected = optax.apply_updates({"policy": params}, updates)
    state, metrics = one_step(start(), batch)
    assert relative_error(state.params, expected) < 1e-6
    squares = sum(float(np.sum(np.square(g.astype(np.float64)))) for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(metrics["grad_norm/policy"], [np.sqrt(squares)], rtol=1e-5)
    ratio = relative_error(expected["policy"], params)
    np.testing.assert_allclose(metrics["update_ratio/policy"], [ratio], rtol=1e-4)


def test_the_state_is_donated_and_a_copy_survives(one_step: Any, batch: Batch) -> None:
    state = start()
    frozen = copy_params(state.params["policy"], param_shardings(MODEL, PLACE), jnp.bfloat16)
    expected = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), state.params["policy"])
    one_step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    jax.tree.map(np.testing.assert_array_equal, frozen, expected)


def test_moments_are_born_where_their_parameters_lie() -> None:
    place = layout("1,8,1")
    shardings = {"policy": param_shardings(MODEL, place)}
    state = init_state({"policy": init_params(MODEL, place, seed=0)}, shardings, OPTIMIZER, GRPO.init(), place)
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
    for moment in (adam.mu, adam.nu):
        for leaf, weight in zip(jax.tree.leaves(moment), jax.tree.leaves(state.params), strict=True):
            assert leaf.sharding == weight.sharding
    assert state.params["policy"]["embed"].addressable_shards[0].data.size * 8 == state.params["policy"]["embed"].size


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def test_the_divergence_by_hand() -> None:
    """Two rows keep 2 and 1 tokens with gaps .5 + 1 and 2; the third keeps none: 3.5 over 3 tokens, over 2 rows."""
    behavior = np.array([[-1.0, -1.0], [-1.0, 9.0], [9.0, 9.0]], np.float32)
    reference = np.array([[-1.5, -2.0], [-3.0, np.nan], [np.nan, 9.0]], np.float32)
    mask = np.array([[True, True], [True, False], [False, False]])
    gaps = make_divergence(PLACE)(behavior, reference, mask)
    np.testing.assert_allclose(gaps["kl_per_token"], 3.5 / 3, rtol=1e-6)
    np.testing.assert_allclose(gaps["kl_per_completion"], 3.5 / 2, rtol=1e-6)
