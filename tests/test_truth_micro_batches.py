"""Truth 4: micro-batches x devices: numerators and denominators are summed over the whole step before dividing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos.base import Algorithm, Batch
from rljax.models.decoder import Params
from rljax.models.params import init_params
from rljax.types import Outputs, Term
from tests.models.tiny import layout, tiny_model
from tests.truths import grpo_algorithm, make_gradient, random_batch, relative_error, tiny_forward

MODEL = tiny_model("llama", vocab_size=61, num_hidden_layers=1)
P, C = 4, 12
# Lengths as unequal as they come, so that the mean of a micro-batch is far from its share of the whole.
LENGTHS = [(4, 1), (1, 12), (2, 2), (4, 12), (3, 1), (4, 1), (1, 9), (2, 3)] * 2
AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length")
SPLITS = [
    ("1,1,1", 2),
    ("1,1,1", 4),
    ("1,8,1", 2),
    pytest.param("1,8,1", 1, marks=pytest.mark.slow),
    pytest.param("2,4,1", 2, marks=pytest.mark.slow),
]

ALGORITHMS = [grpo_algorithm(kl_coef=0.1, entropy_coef=0.01, max_new_tokens=C, aggregation=a) for a in AGGREGATIONS]


def chosen_by_row() -> Algorithm:
    """The four aggregations in one program: the batch's "chosen" says which of them counts."""

    def prepare(state: Any, batch: Batch, key: Any) -> tuple[Any, Batch, dict]:
        counts = [algorithm.prepare(state, batch, key)[2]["aggregated"] for algorithm in ALGORITHMS]
        return state, batch, {f"aggregated/{i}": count for i, count in enumerate(counts)}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        terms = {}
        for i, algorithm in enumerate(ALGORITHMS):
            for name, term in algorithm.loss(outputs, batch).items():
                if term.coef:
                    chosen = term.numerator * batch["chosen"][0, i]
                    terms[f"{name}/{i}"] = Term(chosen, f"aggregated/{i}", term.coef)
        return terms

    return ALGORITHMS[0]._replace(prepare=prepare, loss=loss)


def batch_for(aggregation: str) -> Batch:
    chosen = np.asarray(AGGREGATIONS) == aggregation
    batch = random_batch(np.random.default_rng(0), 61, LENGTHS, P, C)
    return {**batch, "chosen": np.tile(chosen.astype(float), (len(LENGTHS), 1))}


def make(mesh: str, micro_batches: int) -> Any:
    place = layout(mesh)
    model = MODEL.padded_for(place.tensor)
    params = init_params(model, place, seed=0, dtype=jnp.float64)
    program = make_gradient(chosen_by_row(), tiny_forward(model, place, dtype=jnp.float64), P, micro_batches)
    return lambda batch: program(params, batch)[0]


def unpadded(gradient: Params) -> Params:
    """Without the rows that pad the vocabulary to the mesh, which are 0."""
    tables = {name: gradient[name] for name in ("embed", "lm_head")}
    assert not any(table[61:].any() for table in tables.values())
    return {**gradient, **{name: table[:61] for name, table in tables.items()}}


@pytest.fixture(scope="module", autouse=True)
def float64() -> Any:
    """In float32 the order of sums shows, up to 1.4e-6 of the gradient."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def whole() -> dict[str, Params]:
    gradient = make("1,1,1", 1)
    return {aggregation: unpadded(gradient(batch_for(aggregation))) for aggregation in AGGREGATIONS}


@pytest.mark.parametrize(("mesh", "micro_batches"), SPLITS)
def test_one_gradient(whole: dict[str, Params], mesh: str, micro_batches: int) -> None:
    gradient = make(mesh, micro_batches)
    for aggregation in AGGREGATIONS:
        error = relative_error(unpadded(gradient(batch_for(aggregation))), whole[aggregation])
        assert error <= 1e-11, aggregation


def test_the_aggregations_are_four(whole: dict[str, Params]) -> None:
    """Directions differ, but for the two that share a numerator: those differ by the budget."""
    for i, a in enumerate(AGGREGATIONS):
        for b in AGGREGATIONS[:i]:
            assert relative_error(whole[a], whole[b]) > 0.1, (a, b)
    scaled = jax.tree.map(lambda g: g * C, whole["constant_length"])
    assert relative_error(scaled, whole["sequence_mean_token_sum"]) < 1e-11


def test_the_mean_of_micro_batch_means_is_another_gradient(whole: dict[str, Params]) -> None:
    """What a trainer gets that divides each micro-batch by its own count: the test above would fail it."""
    gradient, batch = make("1,1,1", 1), batch_for("token_mean")
    order = np.argsort(batch["loss_mask"].sum(axis=1), kind="stable")
    halves = [{name: x[rows] for name, x in batch.items()} for rows in order.reshape(2, -1)]
    means = [unpadded(gradient(half)) for half in halves]
    averaged = jax.tree.map(lambda a, b: (a + b) / 2, *means)
    assert relative_error(averaged, whole["token_mean"]) > 0.1
    shares = [half["loss_mask"].sum() / batch["loss_mask"].sum() for half in halves]
    weighted = jax.tree.map(lambda a, b: shares[0] * a + shares[1] * b, *means)
    assert relative_error(weighted, whole["token_mean"]) <= 1e-11
