"""Importance weights: hand numbers, constants under differentiation, masked NaN, decoupled PPO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.losses import (
    clipped_surrogate,
    geometric_importance_weights,
    icepop,
    importance_weights,
    masked_importance,
    sequence_importance_weights,
    truncated_importance,
)

pytestmark = pytest.mark.fast

# Token weights 2, 1/2, 3 and a masked NaN; the second row is empty.
PROXIMAL = jnp.log(jnp.array([[2.0, 0.5, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0]])).at[0, 3].set(jnp.nan)
BEHAVIOR = jnp.zeros((2, 4)).at[1].set(-jnp.inf)
MASK = jnp.array([[True, True, True, False], [False] * 4])


def test_what_the_weight_is_of():
    np.testing.assert_allclose(importance_weights(PROXIMAL, BEHAVIOR, MASK), [[2, 0.5, 3, 0], [0] * 4], rtol=1e-6)
    # Product 2 · 1/2 · 3 = 3; geometric mean 3^(1/3).
    np.testing.assert_allclose(
        sequence_importance_weights(PROXIMAL, BEHAVIOR, MASK), [[3, 3, 3, 0], [0] * 4], rtol=1e-6
    )
    mean = 3 ** (1 / 3)
    expected = [[mean, mean, mean, 0], [0] * 4]
    np.testing.assert_allclose(geometric_importance_weights(PROXIMAL, BEHAVIOR, MASK), expected, rtol=1e-6)


def test_what_becomes_of_large_weights():
    weights = jnp.array([0.2, 0.5, 2.0, 2.5])
    np.testing.assert_allclose(truncated_importance(weights, 2.0), [0.2, 0.5, 2.0, 2.0])
    np.testing.assert_allclose(masked_importance(weights, 2.0), [0.2, 0.5, 2.0, 0.0])
    np.testing.assert_allclose(icepop(weights, 0.5, 2.0), [0.0, 0.5, 2.0, 0.0])


def test_a_product_that_overflows_is_clamped():
    far = jnp.full((1, 100), 5.0)
    weights = sequence_importance_weights(far, jnp.zeros((1, 100)), jnp.ones((1, 100), bool))
    np.testing.assert_allclose(weights, np.exp(40.0), rtol=1e-5)


@pytest.mark.parametrize("of", [importance_weights, sequence_importance_weights, geometric_importance_weights])
def test_weights_are_constants(of):
    gradient = jax.grad(lambda *a: of(*a, MASK).sum(), argnums=(0, 1))(PROXIMAL, BEHAVIOR)
    np.testing.assert_array_equal(gradient, np.zeros((2, 2, 4)))


def test_decoupled_ppo_by_hand():
    # Behaviour 1/4, proximal 1/2, current .7: w = 2, ρ = 1.4, clipped to 1.2: -2 · 1.2 · A; the edge is around π_prox.
    behavior, proximal, current = (jnp.log(jnp.full((1, 1), p)) for p in (0.25, 0.5, 0.7))
    mask = jnp.ones((1, 1), bool)

    def loss(current, advantage):
        surrogate = clipped_surrogate(current, proximal, jnp.full((1, 1), advantage), 0.2, 0.2)
        return (importance_weights(proximal, behavior, mask) * surrogate).sum()

    step = jax.jit(jax.value_and_grad(loss))
    value, gradient = step(current, 3.0)
    np.testing.assert_allclose([value, gradient[0, 0]], [-2 * 1.2 * 3, 0.0], rtol=1e-5)
    value, gradient = step(current, -3.0)
    np.testing.assert_allclose([value, gradient[0, 0]], [2 * 1.4 * 3, 2 * 1.4 * 3], rtol=1e-5)
