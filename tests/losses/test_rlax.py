"""Estimators that rlax has too: V-trace, GAE, n-step returns, the clipped surrogate, two-hot weights; no row masked."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.losses import clipped_surrogate, gae, n_step_returns, two_hot, vtrace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    import rlax

pytestmark = pytest.mark.fast

GAMMA, LAM = 0.9, 0.8
ROWS, TOKENS = 3, 9
MASK = jnp.ones((ROWS, TOKENS), bool)


@pytest.fixture
def numbers() -> tuple[np.ndarray, np.ndarray]:
    """Four [rows, tokens] arrays, the first two small enough to be log-probs' differences; and a last value a row."""
    rng = np.random.default_rng(11)
    return rng.normal(size=(4, ROWS, TOKENS)).astype(np.float32), rng.normal(size=ROWS).astype(np.float32)


def following(values: jnp.ndarray, last: jnp.ndarray) -> jnp.ndarray:
    """The value of the state after each token."""
    return jnp.concatenate([values[:, 1:], last[:, None]], axis=1)


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_vtrace(numbers, spread):
    (logprobs, behavior, rewards, values), last = map(jnp.asarray, numbers)
    logprobs, behavior = spread * logprobs, spread * behavior
    discount = jnp.full(TOKENS, GAMMA)
    theirs = jax.vmap(
        lambda v, after, r, rho: rlax.vtrace_td_error_and_advantage(v, after, r, discount, rho, lambda_=1.0)
    )(values, following(values, last), rewards, jnp.exp(logprobs - behavior))
    ours = vtrace(logprobs, behavior, rewards, values, MASK, gamma=GAMMA, bootstrap_values=last)
    np.testing.assert_allclose(ours.returns, theirs.errors + values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.advantages, theirs.pg_advantage, rtol=1e-5, atol=1e-5)


def test_gae(numbers):
    (rewards, values, *_), last = map(jnp.asarray, numbers)
    theirs = jax.vmap(lambda r, v: rlax.truncated_generalized_advantage_estimation(r, jnp.full(TOKENS, GAMMA), LAM, v))(
        rewards, jnp.concatenate([values, last[:, None]], axis=1)
    )
    ours = gae(rewards, values, MASK, gamma=GAMMA, lam=LAM, bootstrap_values=last)
    np.testing.assert_allclose(ours.advantages, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_steps", [1, 3, TOKENS])
def test_n_step_returns(numbers, n_steps):
    (rewards, values, *_), last = map(jnp.asarray, numbers)
    theirs = jax.vmap(lambda r, v: rlax.n_step_bootstrapped_returns(r, jnp.full(TOKENS, GAMMA), v, n_steps))(
        rewards, following(values, last)
    )
    ours = n_step_returns(rewards, values, MASK, n_steps=n_steps, gamma=GAMMA, bootstrap_values=last)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_clipped_surrogate(numbers):
    (logprobs, behavior, advantages, _), _ = map(jnp.asarray, numbers)
    theirs = rlax.clipped_surrogate_pg_loss(jnp.exp(logprobs - behavior).ravel(), advantages.ravel(), 0.2)
    ours = clipped_surrogate(logprobs, behavior, advantages, 0.2, 0.2).mean()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_two_hot():
    """On evenly spaced bins, the ones that rlax has; its weights of -.6, .2 and .8, are off by 4e-6."""
    bins = jnp.linspace(-2.0, 2.0, 9)
    values = jnp.array([-3.0, -2.0, -0.6, 0.0, 1.3, 2.0, 5.0])
    np.testing.assert_allclose(two_hot(values, bins), rlax.transform_to_2hot(values, -2.0, 2.0, 9), atol=1e-5)
