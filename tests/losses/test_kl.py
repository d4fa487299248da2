"""KL estimators and their gradient identities by enumerating every sequence over 5 tokens of length 3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rljax.losses import (
    adaptive_kl_coef,
    fixed_kl_coef,
    full_kl,
    jensen_shannon,
    k1,
    k2,
    k3,
    k4,
    reinforce,
    reward_to_go,
    shaped_rewards,
    straight_through,
)

pytestmark = pytest.mark.fast

VOCAB, LENGTH = 5, 3
SEQUENCES = np.stack(np.meshgrid(*[np.arange(VOCAB)] * LENGTH, indexing="ij"), -1).reshape(-1, LENGTH)
PREFIX = np.stack([np.zeros(125, int), SEQUENCES[:, 0], VOCAB * SEQUENCES[:, 0] + SEQUENCES[:, 1]], axis=1)
ROWS = [1, VOCAB, VOCAB**2]  # prefixes of length 0, 1, 2


@pytest.fixture
def policies():
    """Logits of each prefix, of the policy and of the reference, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        yield [[jnp.asarray(rng.normal(size=(n, VOCAB))) for n in ROWS] for _ in range(2)]


def logprobs_of(policy):
    """[125, 3]: the log-prob of each token of each sequence."""
    tables = [jax.nn.log_softmax(table) for table in policy]
    return jnp.stack([table[PREFIX[:, t], SEQUENCES[:, t]] for t, table in enumerate(tables)], axis=1)


def probabilities(policy):
    return lax.stop_gradient(jnp.exp(logprobs_of(policy).sum(axis=1)))


def per_prefix(divergence, policy, ref):
    """Σ over prefixes of P(prefix), held constant, times the divergence of the next-token distributions."""
    weights, total = jnp.ones(1), 0.0
    for table, ref_table in zip(policy, ref, strict=True):
        p, q = jax.nn.softmax(table), jax.nn.softmax(ref_table)
        total += jnp.sum(weights[:, None] * divergence(p, q))
        weights = lax.stop_gradient(weights[:, None] * p).ravel()
    return total


def forward(p, q):
    return p * (jnp.log(p) - jnp.log(q))


def sequence_kl(policy, ref):
    logp, logq = (logprobs_of(x).sum(axis=1) for x in (policy, ref))
    return jnp.sum(jnp.exp(logp) * (logp - logq))


def gradients_of(policy, *functions):
    """The gradient of each function, as one vector, from one compiled program."""
    flat = lambda tables: jnp.concatenate([table.ravel() for table in tables])  # noqa: E731
    gradients = jax.jit(lambda policy: [flat(jax.grad(function)(policy)) for function in functions])(policy)
    assert all(gradient.dtype == jnp.float64 for gradient in gradients)
    return gradients


def expected(estimator, ref):
    """E over on-policy samples of the sum of an estimator over tokens; the samples do not depend on the parameters."""

    def total(policy):
        logprobs, ref_logprobs = logprobs_of(policy), logprobs_of(ref)
        return jnp.sum(probabilities(policy)[:, None] * estimator(logprobs, ref_logprobs))

    return total


def on_policy_k4(logprobs, ref_logprobs):
    return k4(logprobs, ref_logprobs, logprobs)


def test_values_are_unbiased(policies):
    policy, ref = policies
    estimators = (k2, k1, k3, on_policy_k4, straight_through)

    @jax.jit
    def values(policy):
        exact = sequence_kl(policy, ref), per_prefix(forward, policy, ref)
        return exact, [expected(estimator, ref)(policy) for estimator in estimators]

    (exact, by_prefix), (of_k2, *unbiased) = values(policy)
    np.testing.assert_allclose(by_prefix, exact, atol=1e-12)
    np.testing.assert_allclose(unbiased, exact, rtol=0, atol=1e-9)
    assert abs(of_k2 - exact) > 1e-2


def test_per_token_gradient_identities(policies):
    policy, ref = policies
    estimators = (k1, k2, on_policy_k4, straight_through, k3)
    exact = (lambda p: per_prefix(forward, p, ref), lambda p: per_prefix(lambda a, b: forward(b, a), p, ref))
    of_k1, *of_kl, of_k3, to_ref, from_ref = gradients_of(policy, *(expected(k, ref) for k in estimators), *exact)
    np.testing.assert_allclose(of_k1, 0.0, atol=1e-9)
    for gradient in of_kl:
        np.testing.assert_allclose(gradient, to_ref, rtol=0, atol=1e-9)
    np.testing.assert_allclose(of_k3, from_ref, rtol=0, atol=1e-9)


def test_sequence_gradient_identities(policies):
    policy, ref = policies
    mask = jnp.ones((125, LENGTH), bool)

    def squared_sum(policy):
        d = k1(logprobs_of(policy), logprobs_of(ref)).sum(axis=1)
        return jnp.sum(probabilities(policy) * jnp.square(d) / 2)

    def penalty_in_the_reward(policy):
        logprobs = logprobs_of(policy)
        rewards = shaped_rewards(jnp.zeros(125), logprobs, logprobs_of(ref), mask, kl_coef=1.0)
        advantages = lax.stop_gradient(reward_to_go(rewards, mask, gamma=1.0))
        return jnp.sum(probabilities(policy)[:, None] * reinforce(logprobs, advantages))

    functions = (squared_sum, penalty_in_the_reward, expected(k2, ref), lambda p: sequence_kl(p, ref))
    of_square, of_reward, of_k2, exact = gradients_of(policy, *functions)
    np.testing.assert_allclose(of_square, exact, rtol=0, atol=1e-9)
    np.testing.assert_allclose(of_reward, exact, rtol=0, atol=1e-9)
    # k2 summed over tokens drops what a token does to the KL of later ones.
    assert jnp.linalg.norm(of_k2 - exact) > 0.1 * jnp.linalg.norm(exact)


def test_k4_is_unbiased_off_policy(policies):
    policy, ref = policies
    sampler = [0.5 * table for table in policy]

    def off_policy(policy):
        tokens = k4(logprobs_of(policy), logprobs_of(ref), logprobs_of(sampler))[:, 0]  # first token: one prefix
        return jnp.sum(probabilities(sampler) * tokens)

    def exact(policy):
        return per_prefix(forward, policy[:1], ref[:1])

    np.testing.assert_allclose(off_policy(policy), exact(policy), atol=1e-9)
    np.testing.assert_allclose(*gradients_of(policy, off_policy, exact), rtol=0, atol=1e-9)


def test_estimators_by_hand():
    # d = ln 2: k1 = .6931, k2 = .2402, k3 = 1/2 - 1 + .6931 = .1931; sampled from π/2: ρ = 2, k4 = 1.3863.
    logprobs, ref_logprobs = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
    np.testing.assert_allclose(k1(logprobs, ref_logprobs), [0.693147], rtol=1e-5)
    np.testing.assert_allclose(k2(logprobs, ref_logprobs), [0.240227], rtol=1e-5)
    np.testing.assert_allclose(k3(logprobs, ref_logprobs), [0.193147], rtol=1e-5)
    np.testing.assert_allclose(straight_through(logprobs, ref_logprobs), [0.193147], rtol=1e-5)
    np.testing.assert_allclose(k4(logprobs, ref_logprobs, ref_logprobs), [1.386294], rtol=1e-5)


def test_the_low_variance_estimator_is_never_negative():
    """On differences of all sizes and both signs."""
    d = np.concatenate([-np.logspace(-8, 2, 400), [0.0], np.logspace(-8, 2, 400)])
    for dtype, is_wide in ((np.float32, False), (np.float64, True)):
        with jax.enable_x64(is_wide):
            values = np.asarray(k3(jnp.asarray(d, dtype), jnp.zeros(len(d), dtype)))
        assert values.dtype == dtype and (values >= 0).all() and (values[np.abs(d) > 1e-3] > 0).all()


def test_clamp_and_small_differences():
    far = jnp.array([-1e4, 0.0]), jnp.array([0.0, -1e4])
    np.testing.assert_array_equal(k1(*far), [-40.0, 40.0])
    assert np.isfinite(k3(*far)).all() and (k3(*far) >= 0).all()
    np.testing.assert_array_equal(jax.grad(lambda x: k3(x, far[1]).sum())(far[0]), 0.0)
    # d = 1e-4: k3 = d²/2 = 5e-9, far below the rounding of exp(-d) in float32, which expm1 does not have.
    with jax.enable_x64(True):
        expected_k3 = k3(jnp.float64(np.float32(1e-4)), jnp.float64(0.0))
    assert expected_k3.dtype == jnp.float64
    np.testing.assert_allclose(k3(jnp.float32(1e-4), jnp.float32(0.0)), expected_k3, atol=4e-12)


def test_full_kl_and_jensen_shannon_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = ½ ln 2 + ½ ln 2/3 = ½ ln 4/3.
    p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    np.testing.assert_allclose(full_kl(p + 3.0, q), 0.5 * np.log(4 / 3), rtol=1e-5)
    # m = (3/8, 5/8): KL(p‖m) = ½ ln 16/15, KL(q‖m) = ¼ ln 2/3 + ¾ ln 6/5.
    expected_js = 0.5 * (0.5 * np.log(16 / 15)) + 0.5 * (0.25 * np.log(2 / 3) + 0.75 * np.log(6 / 5))
    np.testing.assert_allclose(jensen_shannon(p, q), expected_js, rtol=1e-4)
    np.testing.assert_allclose(jensen_shannon(p, q, 0.3), jensen_shannon(q, p, 0.7), rtol=1e-4)
    apart = jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0])
    np.testing.assert_allclose(jensen_shannon(*apart), np.log(2), rtol=1e-6)
    for weight in (0.0, 1.0):
        with pytest.raises(ValueError, match="weight="):
            jensen_shannon(p, q, weight)


@pytest.mark.parametrize("divergence", [full_kl, jensen_shannon])
def test_absent_tokens_leave_gradients_finite(divergence):
    p, q = jnp.array([0.3, -1.0, -jnp.inf]), jnp.array([1.0, 0.2, -jnp.inf])
    np.testing.assert_allclose(divergence(p, q), divergence(p[:2], q[:2]), rtol=1e-6)
    for position in (0, 1):
        gradient = jax.grad(divergence, argnums=position)(p, q)
        np.testing.assert_allclose(gradient[:2], jax.grad(divergence, argnums=position)(p[:2], q[:2]), rtol=1e-5)
        assert gradient[2] == 0.0


def test_controllers():
    assert fixed_kl_coef(0.05, 9.0) == 0.05
    options = {"target_kl": 6.0, "horizon": 10_000, "n_samples": 500}
    # Error 7.2/6 - 1 = .2 at its bound, times 500/10000 = .05: factor 1.01. Beyond it nothing more; below, 1 - .01.
    np.testing.assert_allclose(adaptive_kl_coef(0.05, 7.2, **options), 0.05 * 1.01, rtol=1e-6)
    np.testing.assert_allclose(adaptive_kl_coef(0.05, 60.0, **options), 0.05 * 1.01, rtol=1e-6)
    np.testing.assert_allclose(adaptive_kl_coef(0.05, 0.0, **options), 0.05 * 0.99, rtol=1e-6)
    # Error 6.6/6 - 1 = .1: factor 1.005.
    np.testing.assert_allclose(adaptive_kl_coef(0.05, 6.6, **options), 0.05 * 1.005, rtol=1e-6)
