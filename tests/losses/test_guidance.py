"""A prior over actions: LINVIT's backward pass against float64 loops, its limits; LMGT's shift."""

import jax
import jax.numpy as jnp
import numpy as np

from rljax.losses.guidance import posterior_logprobs, shifted_rewards, soft_value, soft_value_iteration

H, S, A = 4, 3, 2


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    transitions = rng.dirichlet(np.ones(S), (H, S, A))
    prior = np.log(rng.dirichlet(np.ones(A), (H, S)))
    return rng.normal(size=(H, S, A)), transitions, prior


def backward(temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """One state and one action at a time."""
    rewards, transitions, prior = problem()
    values, policy = np.zeros((H + 1, S)), np.zeros((H, S, A))
    for h in reversed(range(H)):
        for s in range(S):
            q = [rewards[h, s, a] + transitions[h, s, a] @ values[h + 1] for a in range(A)]
            weights = np.exp(prior[h, s]) * np.exp(np.asarray(q) / temperature)
            values[h, s] = temperature * np.log(weights.sum())
            policy[h, s] = np.log(weights / weights.sum())
    return values[:-1], policy


def test_a_random_problem_against_backward_induction_in_float64() -> None:
    with jax.enable_x64(True):
        values, policy = soft_value_iteration(*map(jnp.asarray, problem()), temperature=0.7)
        expected = backward(0.7)
        np.testing.assert_allclose(values, expected[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(policy, expected[1], rtol=0, atol=1e-12)


def test_a_large_temperature_gives_the_prior_and_a_small_one_the_greedy_policy() -> None:
    rewards, transitions, prior = problem()
    with jax.enable_x64(True):
        values, policy = soft_value_iteration(rewards, transitions, prior, temperature=1e8)
        np.testing.assert_allclose(policy, prior, atol=1e-7)
        following = np.zeros(S)
        for h in reversed(range(H)):
            following = (np.exp(prior[h]) * (rewards[h] + transitions[h] @ following)).sum(axis=1)
        np.testing.assert_allclose(values[0], following, atol=1e-6)

        values, policy = soft_value_iteration(rewards, transitions, prior, temperature=1e-4)
        following = np.zeros(S)
        for h in reversed(range(H)):
            q = rewards[h] + transitions[h] @ following
            np.testing.assert_array_equal(np.exp(policy[h]).round(6).argmax(axis=1), q.argmax(axis=1))
            following = q.max(axis=1)
        np.testing.assert_allclose(values[0], following, atol=1e-2)


def test_the_posterior_maximises_value_less_kl() -> None:
    """``soft_value`` is Σ π Q - λ KL(π‖prior) at the posterior, and less anywhere else."""
    with jax.enable_x64(True):
        q, prior = jnp.array([1.0, -0.5]), jnp.log(jnp.array([0.3, 0.7]))

        def objective(logp: jax.Array) -> jax.Array:
            return jnp.sum(jnp.exp(logp) * (q - 0.5 * (logp - prior)))

        best = posterior_logprobs(q, prior, 0.5)
        np.testing.assert_allclose(objective(best), soft_value(q, prior, 0.5), rtol=1e-12)
        assert all(objective(jnp.log(jnp.array([p, 1 - p]))) < objective(best) for p in (0.1, 0.5, 0.8))


def test_a_bonus_is_a_reward() -> None:
    rewards, transitions, prior = problem()
    bonus = np.full_like(rewards, 0.1)
    plain = soft_value_iteration(rewards, transitions, prior, temperature=1.0)[0]
    optimistic = soft_value_iteration(rewards, transitions, prior, temperature=1.0, bonus=bonus)[0]
    np.testing.assert_allclose(optimistic - plain, np.tile(0.1 * np.arange(H, 0, -1)[:, None], (1, S)), atol=1e-5)


def test_a_shift_of_0_is_the_identity_and_a_finished_one_too() -> None:
    rewards, shift = jnp.array([1.0, -2.0]), jnp.array([0.5, 1.0])
    np.testing.assert_array_equal(shifted_rewards(rewards, jnp.zeros(2), coef=3.0, progress=0.0), rewards)
    np.testing.assert_array_equal(shifted_rewards(rewards, shift, coef=3.0, progress=1.0), rewards)
    np.testing.assert_array_equal(shifted_rewards(rewards, shift, coef=3.0, progress=5.0), rewards)
    # 1 + 2 · ¾ · .5 and -2 + 2 · ¾ · 1.
    np.testing.assert_allclose(shifted_rewards(rewards, shift, coef=2.0, progress=0.25), [1.75, -0.5])
