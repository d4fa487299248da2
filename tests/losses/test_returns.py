"""Recursions over tokens: hand numbers, O(T²) definitions in NumPy, gaps that change nothing, finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.losses import (
    gae,
    is_last_token,
    n_step_returns,
    on_last_token,
    reward_to_go,
    shaped_rewards,
    vtrace,
)

pytestmark = pytest.mark.fast

GAMMA, LAM = 0.9, 0.8


def rows(seed=0, b=4, t=7):
    """Kept tokens with left padding, gaps and an empty row; NaN wherever the mask is False."""
    rng = np.random.default_rng(seed)
    mask = rng.random((b, t)) < 0.7
    mask[-1] = False
    arrays = [np.where(mask, rng.normal(size=(b, t)), np.nan) for _ in range(4)]
    return mask, arrays, rng.normal(size=b)


def compact(mask, array):
    """Each row's kept entries, alone."""
    return [row[kept] for row, kept in zip(array, mask, strict=True)]


def numpy_vtrace(logprobs, behavior_logprobs, rewards, values, last_value, rho_clip=1.0, c_clip=1.0):
    """The sum of 1802.01561, eq. 1, without a recursion."""
    n = len(rewards)
    weights = np.exp(logprobs - behavior_logprobs)
    rho, c = np.minimum(weights, rho_clip), np.minimum(weights, c_clip)
    following = np.append(values[1:], last_value)
    delta = rho * (rewards + GAMMA * following - values)
    targets = np.array(
        [values[s] + sum(GAMMA ** (t - s) * np.prod(c[s:t]) * delta[t] for t in range(s, n)) for s in range(n)]
    )
    return rho * (rewards + GAMMA * np.append(targets[1:], last_value) - values), targets


def numpy_gae(rewards, values, last_value):
    """The double sum of 1506.02438, eq. 16."""
    delta = rewards + GAMMA * np.append(values[1:], last_value) - values
    n = len(rewards)
    advantages = np.array([sum((GAMMA * LAM) ** (t - s) * delta[t] for t in range(s, n)) for s in range(n)])
    return advantages, advantages + values


def numpy_n_step(rewards, values, last_value, n_steps):
    n = len(rewards)
    ends = np.append(values, last_value)
    result = []
    for s in range(n):
        stop = min(s + n_steps, n)
        result.append(sum(GAMMA ** (t - s) * rewards[t] for t in range(s, stop)) + GAMMA ** (stop - s) * ends[stop])
    return np.array(result)


def assert_rows(actual, mask, expected):
    assert actual.dtype == jnp.float64
    for kept, expected_row in zip(compact(mask, np.asarray(actual)), expected, strict=True):
        np.testing.assert_allclose(kept, expected_row, rtol=1e-11, atol=1e-12)
    np.testing.assert_array_equal(np.asarray(actual)[~mask], 0.0)


def test_gae_by_hand():
    # γ = 1/2, λ = 1/2, so γλ = 1/4. δ_1 = 3 - 2 = 1; δ_0 = 0 + 2/2 - 1 = 0; A = [0 + 1/4, 1]; R = A + V.
    rewards, values = jnp.array([[0.0, 3.0]]), jnp.array([[1.0, 2.0]])
    result = gae(rewards, values, jnp.ones((1, 2), bool), gamma=0.5, lam=0.5)
    np.testing.assert_allclose(result.advantages, [[0.25, 1.0]])
    np.testing.assert_allclose(result.returns, [[1.25, 3.0]])
    # Bootstrapping with 4 adds γ·4 = 2 to δ_1, a quarter of that to A_0.
    bootstrapped = gae(rewards, values, jnp.ones((1, 2), bool), gamma=0.5, lam=0.5, bootstrap_values=jnp.array([4.0]))
    np.testing.assert_allclose(bootstrapped.advantages, [[0.75, 3.0]])


@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_matches_the_double_sum(bootstrap):
    with jax.enable_x64(True):
        mask, (rewards, values, *_), last = rows()
        last = last if bootstrap else np.zeros_like(last)
        options = {"bootstrap_values": jnp.asarray(last)} if bootstrap else {}
        result = gae(jnp.asarray(rewards), jnp.asarray(values), mask, gamma=GAMMA, lam=LAM, **options)
        expected = [numpy_gae(*row) for row in zip(compact(mask, rewards), compact(mask, values), last, strict=True)]
        assert_rows(result.advantages, mask, [row[0] for row in expected])
        assert_rows(result.returns, mask, [row[1] for row in expected])


@pytest.mark.parametrize("clips", [(1.0, 1.0), (2.0, 0.5)])
def test_vtrace_matches_the_sum_of_products(clips):
    with jax.enable_x64(True):
        mask, arrays, last = rows()
        result = vtrace(
            *map(jnp.asarray, arrays), mask, gamma=GAMMA, rho_clip=clips[0], c_clip=clips[1], bootstrap_values=last
        )
        columns = [compact(mask, x) for x in arrays]
        expected = [numpy_vtrace(*row, *clips) for row in zip(*columns, last, strict=True)]
        assert_rows(result.advantages, mask, [row[0] for row in expected])
        assert_rows(result.returns, mask, [row[1] for row in expected])


def test_vtrace_on_policy_gives_the_reward_to_go():
    with jax.enable_x64(True):
        mask, (logprobs, rewards, values, _), last = rows()
        options = {"gamma": GAMMA, "bootstrap_values": last}
        targets = vtrace(logprobs, logprobs, rewards, values, mask, **options).returns
        np.testing.assert_allclose(targets, reward_to_go(rewards, mask, **options), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 99])
def test_n_step_returns_match_the_sum(n_steps):
    with jax.enable_x64(True):
        mask, (rewards, values, *_), last = rows()
        arguments = (jnp.asarray(rewards), jnp.asarray(values), mask)
        actual = n_step_returns(*arguments, n_steps=n_steps, gamma=GAMMA, bootstrap_values=last)
        columns = (compact(mask, rewards), compact(mask, values), last)
        assert_rows(actual, mask, [numpy_n_step(*row, n_steps) for row in zip(*columns, strict=True)])
        if n_steps == 99:
            to_go = reward_to_go(jnp.asarray(rewards), mask, gamma=GAMMA, bootstrap_values=last)
            np.testing.assert_allclose(actual, to_go, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="n_steps=0"):
        n_step_returns(*arguments, n_steps=0, gamma=GAMMA)


def test_a_masked_span_changes_no_number():
    rng = np.random.default_rng(3)
    rewards, values, logprobs, behavior = rng.normal(size=(4, 2, 5)).astype(np.float32)
    gap = lambda x, fill: np.concatenate([x[:, :2], np.full((2, 3), fill, x.dtype), x[:, 2:]], axis=1)  # noqa: E731
    mask = np.ones((2, 5), bool)
    for function, arrays in [
        (lambda *a: gae(*a, gamma=GAMMA, lam=LAM), (rewards, values)),
        (lambda *a: vtrace(*a, gamma=GAMMA), (logprobs, behavior, rewards, values)),
        (lambda *a: [n_step_returns(*a, n_steps=3, gamma=GAMMA)], (rewards, values)),
        (lambda *a: [reward_to_go(*a, gamma=GAMMA)], (rewards,)),
    ]:
        function = jax.jit(function)
        plain = function(*arrays, mask)
        with_gap = function(*(gap(x, np.nan) for x in arrays), gap(mask, False))
        for a, b in zip(plain, with_gap, strict=True):
            np.testing.assert_array_equal(np.delete(b, [2, 3, 4], axis=1), a)


def test_shaped_rewards_by_hand():
    # k1 = .5, 1 at the kept tokens, times .1; the score stands on the last kept one. The empty row loses its score.
    logprobs = jnp.array([[jnp.nan, -1.0, -2.0, jnp.inf], [0.0, 0.0, 0.0, 0.0]])
    ref_logprobs = jnp.array([[0.0, -1.5, -3.0, jnp.nan], [0.0, 0.0, 0.0, 0.0]])
    mask = jnp.array([[False, True, True, False], [False] * 4])
    rewards = shaped_rewards(jnp.array([2.0, 9.0]), logprobs, ref_logprobs, mask, kl_coef=0.1)
    np.testing.assert_allclose(rewards, [[0, -0.05, 1.9, 0], [0, 0, 0, 0]], atol=1e-7)


def test_rewards_may_be_integers_and_values_wider():
    with jax.enable_x64(True):
        mask = jnp.ones((1, 2), bool)
        result = gae(jnp.array([[0, 3]]), jnp.array([[1.0, 2.0]]), mask, gamma=0.5, lam=0.5)
        np.testing.assert_array_equal(result.advantages, [[0.25, 1.0]])
        assert result.returns.dtype == jnp.float64


def test_last_token_survives_gaps():
    mask = jnp.array([[True, False, True, False, False], [False] * 5, [False, False, False, False, True]])
    np.testing.assert_array_equal(np.nonzero(is_last_token(mask)), [[0, 2], [2, 4]])
    np.testing.assert_array_equal(on_last_token(jnp.array([3.0, 4.0, 5.0]), mask)[[0, 2], [2, 4]], [3.0, 5.0])


def test_gradients_are_finite_where_masked_entries_are_not():
    mask, arrays, last = rows()
    arrays = [jnp.where(mask, x, fill) for x, fill in zip(arrays, (jnp.nan, -jnp.inf, jnp.inf, jnp.nan), strict=True)]

    def total(arrays):
        logprobs, behavior, rewards, values = arrays
        shaped = shaped_rewards(last, logprobs, behavior, mask, kl_coef=0.1)
        results = (
            gae(rewards + shaped, values, mask, gamma=GAMMA, lam=LAM),
            vtrace(*arrays, mask, gamma=GAMMA),
            n_step_returns(rewards, values, mask, n_steps=2, gamma=GAMMA),
        )
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(results))

    for gradient in jax.jit(jax.grad(total))(arrays):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[~mask], 0.0)
