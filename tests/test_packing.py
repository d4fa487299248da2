"""Rows packed into bins: where they go, and that packed is unpacked in gradients, metrics and scores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos import sft
from rljax.algos.base import Algorithm, Batch
from rljax.forward import make_score, make_value
from rljax.models.params import init_params
from rljax.packing import Packing, make_packing, place_rows
from rljax.sharding import to_global
from rljax.types import Outputs, Term
from tests.models.tiny import layout, tiny_model
from tests.truths import grpo_algorithm, make_gradient, random_batch, relative_error, tiny_forward

MODEL = tiny_model("llama", vocab_size=61, num_hidden_layers=1, hidden_size=16)
P, C = 4, 12
LENGTHS = [(4, 1), (1, 12), (2, 2), (4, 12), (3, 1), (4, 1), (1, 9), (2, 3), (1, 1), (2, 0), (3, 5), (1, 2)] * 2
LENGTHS = LENGTHS[:16]


def test_first_fit_by_hand() -> None:
    """Bins of 10, two a micro-batch, longest row first: 9 and 6 open the first two bins; 5 finds 1 and 4 left there and
    opens the second micro-batch; 4 stands behind 6, 1 behind 9.
    """
    places = place_rows(Packing(3, 2, 10), jnp.asarray([4, 9, 1, 6, 5, 0]))
    np.testing.assert_array_equal(places.micro_batch, [0, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(places.start[:5], [16, 0, 9, 10, 0])
    assert places.used == 2


@pytest.mark.parametrize(("unit", "bins"), [(1, 1), (1, 3), (2, 2), (2, 4), (3, 6)])
def test_every_row_has_a_place_of_its_own_beside_its_unit(unit: int, bins: int) -> None:
    """Random lengths, from all short to all as long as a bin: the declared worst case always holds them."""
    rng, length, micro_batches = np.random.default_rng(0), 12, 4
    n = bins * micro_batches
    packing = Packing(micro_batches, bins, length, unit)
    program = jax.jit(lambda lengths: place_rows(packing, lengths))
    used = []
    for low in (0, 1, 4, 7, 12):
        lengths = rng.integers(low, length + 1, n).astype(np.int32)
        places = jax.device_get(program(lengths))
        owners = np.full((micro_batches, bins * length), -1)
        for row, (m, start, size) in enumerate(zip(places.micro_batch, places.start, lengths, strict=True)):
            part = slice(int(start), int(start) + int(size))
            assert (owners[m, part] == -1).all()
            assert size == 0 or start // length == (start + size - 1) // length  # inside one bin
            owners[m, part] = row
        assert (places.micro_batch.reshape(-1, unit) == places.micro_batch[::unit, None]).all()
        assert np.bincount(places.micro_batch).max() <= packing.rows
        used.append(int(places.used))
    assert used[-1] == micro_batches and used[0] < micro_batches


def test_rows_longer_than_bins_are_refused() -> None:
    batch = random_batch(np.random.default_rng(0), 61, [(4, 12)] * 4, P, C)
    with pytest.raises(ValueError, match=r"batch.row_length is 15 and rows have up to 16 tokens; raise it"):
        make_packing(batch, layout(), micro_batches=2, bin_length=15)
    assert make_packing(batch, layout("1,2,1"), micro_batches=2, bin_length=40, unit=1) == Packing(2, 1, 40)


def pairs() -> Algorithm:
    """A preference loss: an empty pair would count, with log 2, if it were taken for a real one."""

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        sums = jnp.sum(jnp.where(batch["loss_mask"], outputs.logprobs, 0), axis=1).reshape(-1, 2)
        losses = jax.nn.softplus(sums[:, 1] - sums[:, 0])
        return {"pairs": Term(jnp.sum(losses), ""), "count": Term(jnp.float32(losses.size), "", 0.0)}

    def prepare(state: Any, batch: Batch, key: Any) -> tuple[Any, Batch, dict]:
        return state, batch, {"": jnp.float32(1)}

    return sft.make(sft.Config(), group_size=1, max_new_tokens=1)._replace(loss=loss, prepare=prepare, unit=2)


ALGORITHMS = {
    "grpo": grpo_algorithm(kl_coef=0.1, entropy_coef=0.01, max_new_tokens=C, aggregation="sequence_mean_token_mean"),
    "pairs": pairs(),
}


@pytest.mark.parametrize("mesh", ["1,1,1", "1,2,2"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_packed_is_unpacked(name: str, mesh: str) -> None:
    """Gradient and metrics in float64, against all rows at once; other lengths go through the same program."""
    with jax.enable_x64(True):
        place = layout(mesh)
        model = MODEL.padded_for(place.tensor)
        params = init_params(model, place, seed=0, dtype=jnp.float64)
        forward = tiny_forward(model, place, dtype=jnp.float64)
        whole = make_gradient(ALGORITHMS[name], forward, P)
        packed = make_gradient(ALGORITHMS[name], forward, P, micro_batches=4, bin_length=0)
        before = None
        for lengths in (LENGTHS, [(4, 12)] * 16, LENGTHS[::-1]):
            batch = random_batch(np.random.default_rng(0), 61, lengths, P, C)
            expected, metrics = whole(params, batch)
            gradient, found = packed(params, batch)
            assert relative_error(gradient, expected) <= 1e-11
            assert set(found) == set(metrics)
            for key, value in metrics.items():
                np.testing.assert_allclose(found[key], value, rtol=1e-9, atol=1e-12, err_msg=key)
            assert before is None or relative_error(gradient, before) > 0.01
            before = gradient


@pytest.mark.parametrize("mesh", ["1,1,1", "1,4,1"])
def test_packed_scores_are_unpacked_ones(mesh: str) -> None:
    place, scalar = layout(mesh), MODEL._replace(scores=1)
    batch = random_batch(np.random.default_rng(0), 61, LENGTHS, P, C)
    rows = {name: to_global(batch[name], place.rows) for name in ("tokens", "valid")}
    params, critic = (init_params(model, place, seed=0) for model in (MODEL, scalar))
    whole, packed = (make_score(tiny_forward(MODEL, place), P, 4, length)(params, rows) for length in (None, 0))
    assert np.asarray(whole).any()
    np.testing.assert_allclose(packed, whole, rtol=0, atol=2e-6)
    values = [make_value(tiny_forward(scalar, place), 4, length)(critic, rows) for length in (None, 0)]
    mask = batch["loss_mask"]
    np.testing.assert_allclose(np.asarray(values[1][0])[mask], np.asarray(values[0][0])[mask], rtol=0, atol=2e-6)
    real = batch["valid"].any(axis=1)
    np.testing.assert_allclose(np.asarray(values[1][1])[real], np.asarray(values[0][1])[real], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("rows", "mesh"), [(10, "1,1,1"), (12, "1,4,1"), (2, "1,1,1")])
def test_scores_of_any_number_of_rows(rows: int, mesh: str) -> None:
    """Rows as long as a bin in pieces that do not divide them: an evaluation's, say, beside a rollout's 4 pieces."""
    place = layout(mesh)
    batch = random_batch(np.random.default_rng(0), 61, [(4, 12)] * rows, P, C)
    placed = {name: to_global(batch[name], place.rows) for name in ("tokens", "valid")}
    params = init_params(MODEL, place, seed=0)
    whole = make_score(tiny_forward(MODEL, place), P, 1)(params, placed)
    for length in (None, 0):
        found = make_score(tiny_forward(MODEL, place), P, 4, length)(params, placed)
        np.testing.assert_allclose(found, whole, rtol=0, atol=2e-6)


def test_unequal_micro_batches_are_refused() -> None:
    batch = random_batch(np.random.default_rng(0), 61, [(4, 12)] * 10, P, C)
    with pytest.raises(ValueError, match=r"10 rows do not divide into 4 micro-batches over 1 data shards"):
        make_packing(batch, layout(), micro_batches=4, bin_length=0)


def test_micro_batches_that_cut_a_unit_are_refused() -> None:
    """Eight micro-batches of one row, or four of one row on each of two shards: a pair's answers would part."""
    batch = random_batch(np.random.default_rng(0), 61, [(4, 12)] * 8, P, C)
    for mesh, micro_batches in (("1,1,1", 8), ("1,2,1", 4)):
        with pytest.raises(ValueError, match=r"1 rows on each of \d data shards, which are not whole units of 2"):
            make_packing(batch, layout(mesh), micro_batches, bin_length=0, unit=2)
    assert make_packing(batch, layout("1,2,1"), 2, bin_length=0, unit=2).bins == 2
