"""Supervised fine-tuning on tables of log-probs."""

import jax
import jax.numpy as jnp
import numpy as np

from rljax.algos.base import total
from rljax.algos.sft import Config, make
from rljax.types import Outputs

ALGORITHM = make(Config(), group_size=1, max_new_tokens=1)
LOGPROBS = np.array([[np.nan, -1.0, -2.0, -3.0], [np.nan, -4.0, np.inf, -np.inf]], np.float32)
MASK = np.array([[False, True, True, True], [False, True, False, False]])


def loss(logprobs: jax.Array, mask: np.ndarray) -> jax.Array:
    _, batch, denominators = ALGORITHM.prepare((), {"loss_mask": jnp.asarray(mask)}, None)
    return total(ALGORITHM.loss(Outputs(logprobs), batch), denominators)


def test_tokens_weigh_alike_whatever_their_row() -> None:
    """(1 + 2 + 3 + 4) / 4 and not the mean of the rows' means, 2 and 4."""
    np.testing.assert_allclose(loss(jnp.asarray(LOGPROBS), MASK), 2.5, rtol=1e-6)


def test_the_gradient_is_minus_one_over_the_count_where_trained_and_0_elsewhere() -> None:
    gradient = jax.grad(loss)(jnp.asarray(LOGPROBS), MASK)
    np.testing.assert_allclose(gradient, np.where(MASK, -1 / 4, 0), rtol=1e-6)


def test_halves_over_the_whole_step_s_count_add_up() -> None:
    denominators = ALGORITHM.prepare((), {"loss_mask": jnp.asarray(MASK)}, None)[2]
    halves = [ALGORITHM.loss(Outputs(LOGPROBS[i : i + 1]), {"loss_mask": MASK[i : i + 1]}) for i in range(2)]
    np.testing.assert_allclose(sum(total(half, denominators) for half in halves), 2.5, rtol=1e-6)


def test_it_needs_nothing_and_samples_nothing() -> None:
    assert ALGORITHM.needs == frozenset()
    assert ALGORITHM.targets is None
    assert ALGORITHM.init() == ()
