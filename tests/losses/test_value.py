"""Value losses and the two-hot head: hand numbers, inverses, expectations kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.losses import (
    clipped_value_loss,
    ema_critic_regularizer,
    huber_value_loss,
    squared_value_loss,
    symexp,
    symlog,
    two_hot,
    two_hot_cross_entropy,
    two_hot_value,
    unimix,
    unimix_logprobs,
    value_bins,
)

pytestmark = pytest.mark.fast


def test_squared_and_huber_by_hand():
    values, returns = jnp.array([1.0, 3.0]), jnp.array([0.5, 0.0])
    np.testing.assert_allclose(squared_value_loss(values, returns), [0.125, 4.5])
    # δ = 2: 1/2 · .25; 2 · (3 - 1) = 4. Slopes: the distance inside, δ outside.
    np.testing.assert_allclose(huber_value_loss(values, returns, 2.0), [0.125, 4.0])
    gradient = jax.grad(lambda v: huber_value_loss(v, returns, 2.0).sum())(values)
    np.testing.assert_allclose(gradient, [0.5, 2.0])
    assert jax.grad(lambda v: huber_value_loss(v, v, 2.0))(1.0) == 0.0


@pytest.mark.parametrize(
    ("value", "returns", "loss", "slope"),
    [
        # V_old = 1, clip .2, so the second candidate is V clipped to [.8, 1.2].
        (1.1, 2.0, 0.405, -0.9),  # inside: both are (.9)²/2
        (1.5, 2.0, 0.32, 0.0),  # moved towards the return, past the clip: (1.2 - 2)²/2 is larger, no gradient
        (1.5, 1.0, 0.125, 0.5),  # moved away from it: (.5)²/2 > (.2)²/2
    ],
)
def test_clipped_value_loss_by_hand(value, returns, loss, slope):
    actual = jax.value_and_grad(lambda v: clipped_value_loss(v, 1.0, returns, 0.2))(value)
    np.testing.assert_allclose(actual, [loss, slope], rtol=1e-5, atol=1e-7)


def test_symexp_inverts_symlog():
    with jax.enable_x64(True):
        x = jnp.array([-1e6, -3.0, -1e-9, 0.0, 1e-9, 0.5, 1e6])
        assert symlog(x).dtype == jnp.float64
        np.testing.assert_allclose(symexp(symlog(x)), x, rtol=1e-12)
        np.testing.assert_allclose(symlog(jnp.array([np.e - 1, 1 - np.e])), [1.0, -1.0], rtol=1e-12)
        np.testing.assert_allclose(jax.vmap(jax.grad(symlog))(x[1:3]), 1 / (1 + np.abs(x[1:3])), rtol=1e-12)


def test_two_hot_keeps_the_expectation():
    with jax.enable_x64(True):
        bins = value_bins()
        assert bins.shape == (256,) and bins[0] == -20 and bins[-1] == 20
        x = jnp.append(jnp.linspace(-19.99, 19.99, 101), jnp.array([-20.0, 20.0, bins[7]]))
        weights = jax.jit(two_hot)(x, bins)
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-13)
        np.testing.assert_allclose(weights @ bins, x, rtol=1e-12)
        assert ((weights > 0).sum(-1) <= 2).all() and (weights >= 0).all()
        np.testing.assert_array_equal(two_hot(jnp.array([99.0]), bins).argmax(-1), 255)


def test_two_hot_by_hand():
    # Bins -1, 0, 2: .5 lies a quarter of the way from 0 to 2.
    bins = jnp.array([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(two_hot(jnp.array([0.5, -1.0]), bins), [[0, 0.75, 0.25], [1, 0, 0]])
    # A return of e^.5 - 1 has symlog .5; uniform logits cost ln 3 whatever the target.
    np.testing.assert_allclose(two_hot_cross_entropy(jnp.zeros(3), jnp.expm1(0.5), bins), np.log(3), rtol=1e-6)
    # The gradient is softmax - target.
    gradient = jax.grad(two_hot_cross_entropy)(jnp.zeros(3), jnp.expm1(0.5), bins)
    np.testing.assert_allclose(gradient, [1 / 3, 1 / 3 - 0.75, 1 / 3 - 0.25], rtol=1e-5)
    # Value: symexp of the mean bin; 1/2 · 0 + 1/2 · 2 = 1.
    logits = jnp.array([-1e9, 0.0, 0.0])
    np.testing.assert_allclose(two_hot_value(logits, bins), np.e - 1, rtol=1e-6)


def test_zero_logits_mean_zero_value():
    np.testing.assert_allclose(two_hot_value(jnp.zeros(256), value_bins()), 0.0, atol=1e-5)


def test_unimix_by_hand():
    # Probabilities (1, 0, 0, 0) at u = .2: .8 + .05, and .05 each.
    mixed = jnp.exp(unimix(jnp.array([0.0, -jnp.inf, -jnp.inf, -jnp.inf]), 0.2))
    np.testing.assert_allclose(mixed, [0.85, 0.05, 0.05, 0.05], rtol=1e-6)
    # Of one token at a time: p = .5 among 4 at u = .2 is .4 + .05; its slope in log p is .4 / .45.
    one = jax.value_and_grad(lambda logp: unimix_logprobs(logp, 0.2, 4))(jnp.log(0.5))
    np.testing.assert_allclose(one, [np.log(0.45), 0.4 / 0.45], rtol=1e-6)


def test_ema_critic_is_a_constant_target():
    bins = jnp.array([-1.0, 0.0, 2.0])
    slow = jnp.array([-1e9, 0.0, 0.0])  # mean bin 1: target (0, 1/2, 1/2)
    logits = jnp.log(jnp.array([0.2, 0.3, 0.5]))
    loss, gradients = jax.value_and_grad(ema_critic_regularizer, argnums=(0, 1))(logits, slow, bins)
    np.testing.assert_allclose(loss, -(np.log(0.3) + np.log(0.5)) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], [0.2, -0.2, 0.0], atol=1e-6)  # softmax - target
    np.testing.assert_array_equal(gradients[1], 0.0)
