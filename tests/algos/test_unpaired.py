"""KTO and BCO on tables of log-probs."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rljax.algos import bco, kto
from rljax.algos.base import Batch
from rljax.types import Outputs
from tests.algos.tables import mask_of, table, terms_of

# Rows of KTO: (x_1, y_1), (x_1, y_2); (x_2, y_2), (x_2, y_1); and a unit whose mismatched row is empty.
POLICY: list[list[float]] = [[-1, -1], [-1, -0.5], [-2, -1], [-1, -1.5], [-3], []]
REFERENCE: list[list[float]] = [[-1.5, -1.5], [-1, -1], [-1, -1], [-2, -2], [-4], []]
# r of the matched rows: 1, -1 and 1; of the mismatched: .5 and 1.5, whose mean is 1.
LABELS = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 1.0], np.float32)


def batch() -> Batch:
    return {
        "loss_mask": mask_of(POLICY),
        "scores": LABELS,
        "ref_logprobs": table(REFERENCE),
        "current_logprobs": table(POLICY),
    }


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_kto_by_hand() -> None:
    """z0 = 1. λ_D (1 - σ(.5 (1 - 1))) twice, and λ_U (1 - σ(.5 (1 + 1)))."""
    algorithm = kto.make(kto.Config(beta=0.5, desirable_weight=2.0), group_size=1, max_new_tokens=1)
    terms = terms_of(algorithm, Outputs(jnp.asarray(table(POLICY)[0::2])), batch())
    np.testing.assert_allclose(terms["total"], (2 * 0.5 + 2 * 0.5 + 1 - sigmoid(1)) / 3, rtol=1e-6)
    np.testing.assert_allclose(terms["reference_point"], 0.5 * 1, rtol=1e-6)
    np.testing.assert_allclose(terms["reward_desirable"], 0.5 * 1, rtol=1e-6)
    np.testing.assert_allclose(terms["reward_undesirable"], 0.5 * -1, rtol=1e-6)


def test_kto_does_not_depend_on_the_cut_and_moves_matched_rows_only() -> None:
    algorithm = kto.make(kto.Config(beta=0.5), group_size=1, max_new_tokens=1)

    def total(logprobs: jax.Array, pieces: int) -> jax.Array:
        return terms_of(algorithm, Outputs(logprobs), batch(), pieces=pieces)["total"]

    matched = jnp.asarray(table(POLICY)[0::2])
    np.testing.assert_allclose(total(matched, 1), total(matched, 3), rtol=1e-6)
    gradient = jax.grad(total)(matched, 1)
    # -λ β σ(x) σ(-x) / 3 a token of a desirable row; x = 0 in the first.
    np.testing.assert_allclose(gradient[0], [0, -0.5 * 0.25 / 3, -0.5 * 0.25 / 3], rtol=1e-6)
    assert (np.asarray(gradient)[1, 1:] > 0).all() and np.isfinite(gradient).all()


def test_bco_shifts_by_the_mean_of_all_rewards_so_far() -> None:
    """Rewards .5, .25, -.5, .75, .5 and an empty row: δ = .3. Then 1.5 twice: δ = 4.5 / 7."""
    algorithm = bco.make(bco.Config(beta=0.5), group_size=1, max_new_tokens=1)
    state, prepared, _ = algorithm.prepare(algorithm.init(), batch(), jax.random.key(0))
    np.testing.assert_allclose(prepared["shift"], 0.3, rtol=1e-6)
    rewards, good = [0.5, 0.25, -0.5, 0.75, 0.5], [1, 1, 0, 0, 1]
    expected = [-math.log(sigmoid((r - 0.3) * (1 if label else -1))) for r, label in zip(rewards, good, strict=True)]
    terms = terms_of(algorithm, Outputs(jnp.asarray(table(POLICY))), batch(), algorithm.init(), pieces=2)
    np.testing.assert_allclose(terms["total"], np.mean(expected), rtol=1e-6)
    np.testing.assert_allclose(terms["shift"], 0.3, rtol=1e-6)

    more = {"loss_mask": np.ones((2, 1), bool), "scores": np.ones(2), "ref_logprobs": np.full((2, 1), -4.0)}
    _, prepared, _ = algorithm.prepare(state, {**more, "current_logprobs": np.full((2, 1), -1.0)}, jax.random.key(0))
    np.testing.assert_allclose(prepared["shift"], 4.5 / 7, rtol=1e-6)


def test_what_they_read() -> None:
    for module, unit in ((kto, 2), (bco, 1)):
        algorithm = module.make(module.Config(beta=0.1), group_size=1, max_new_tokens=1)
        assert (algorithm.rows, algorithm.unit) == ("labelled", unit)
        assert algorithm.needs == {"ref_logprobs", "current_logprobs"}
