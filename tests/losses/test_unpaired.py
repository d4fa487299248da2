"""KTO and BCO against numbers worked by hand and a torch re-derivation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rljax.losses.advantages import empty_moments, merge_moments, moments_of
from rljax.losses.preferences import sequence_log_ratio
from rljax.losses.unpaired import bco, bco_loss, kto, kto_loss, kto_reference_point

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(3)
DESIRABLE = jnp.array([True, False])


def test_kto_by_hand():
    # r = (1, -1), z0 = .5, β = 1: 2 (1 - σ(.5)) and 3 (1 - σ(1.5)) = 2 * .3775407, 3 * .1824255
    losses = kto(
        jnp.array([-1.0, -3.0]),
        jnp.array([-2.0, -2.0]),
        DESIRABLE,
        jnp.array(0.5),
        beta=1.0,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    np.testing.assert_allclose(losses, [0.7550813, 0.5472765], rtol=1e-6)


def test_kto_reference_point_by_hand():
    policy, ref = jnp.array([-1.0, -2.0, jnp.nan]), jnp.array([-3.0, -1.0, jnp.nan])
    mask = jnp.array([True, True, False])
    assert kto_reference_point(policy, ref, mask) == 0.5  # (2 - 1) / 2
    assert kto_reference_point(ref, policy, mask) == 0  # a KL is not negative
    assert kto_reference_point(policy, ref, jnp.zeros(3, bool)) == 0
    assert kto_reference_point(policy[:2], ref[:2]) == 0.5
    np.testing.assert_array_equal(jax.grad(lambda p: kto_reference_point(p, ref, mask))(policy), 0)


def test_bco_by_hand():
    # βr - δ = 1 * 1 - .5 and -1 - .5: -log σ(.5), -log σ(1.5)
    losses = bco(jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0]), DESIRABLE, jnp.array(0.5), beta=1.0)
    np.testing.assert_allclose(losses, [0.4740770, 0.2014133], rtol=1e-6)


def test_kto_and_bco_equal_torch():
    policy, ref = -RNG.gamma(2.0, 3.0, (2, 64))
    desirable = RNG.uniform(size=64) < 0.3
    p, good = torch.tensor(policy, requires_grad=True), torch.tensor(desirable)
    ratio = p - torch.tensor(ref)
    # KTO as the paper writes it: λ_y - v(x, y) with the value function v.
    value = torch.where(good, 1.2 * torch.sigmoid(0.1 * (ratio - 0.7)), 0.8 * torch.sigmoid(0.1 * (0.7 - ratio)))
    kto_expected = 0.8 + 0.4 * good.double() - value
    bco_expected = torch.nn.functional.binary_cross_entropy_with_logits(
        0.1 * ratio - 0.7, good.double(), reduction="none"
    )
    with jax.enable_x64(True):
        args = jnp.asarray(ref), jnp.asarray(desirable), jnp.asarray(0.7)
        weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
        cases = [
            (lambda x: kto(x, *args, beta=0.1, **weights), kto_expected),
            (lambda x: bco(x, *args, beta=0.1), bco_expected),
        ]
        for ours, expected in cases:
            values, grad = ours(jnp.asarray(policy)), jax.grad(lambda x, f=ours: jnp.sum(f(x)))(jnp.asarray(policy))
            (expected_grad,) = torch.autograd.grad(expected.sum(), p, retain_graph=True)
            np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-9)
            np.testing.assert_allclose(grad, expected_grad.numpy(), rtol=1e-8, atol=1e-12)


def test_bco_shift_is_the_mean_of_all_rewards_so_far():
    """δ over two steps of unequal size equals the mean over both, and the first step starts from nothing."""
    policy, ref = (jnp.asarray(x, jnp.float32) for x in -RNG.gamma(2.0, 3.0, (2, 40)))
    rewards = 0.1 * sequence_log_ratio(policy, ref)
    state = empty_moments()
    for rows in (slice(0, 8), slice(8, 40)):
        state = merge_moments(state, moments_of(rewards[rows], jnp.ones(rewards[rows].shape, bool)))
    np.testing.assert_allclose(state.mean, np.asarray(rewards, np.float64).mean(), rtol=1e-5)


def token_batch():
    """A good row, a bad row and an empty one; NaN wherever the mask is False."""
    nan = jnp.nan
    logprobs = jnp.array([[nan, -1.0, -1.0], [nan, -3.0, nan], [nan, nan, nan]])
    ref = jnp.array([[nan, -2.0, -1.0], [nan, -2.0, nan], [nan, nan, nan]])
    return logprobs, ref, ~jnp.isnan(logprobs), jnp.array([True, False, True])


@pytest.mark.parametrize(
    ("loss", "expected"),
    # r = (1, -1) again, over the two rows that keep a token.
    [(kto_loss, (0.3775407 + 0.1824255) / 2), (bco_loss, (0.4740770 + 0.2014133) / 2)],
)
def test_one_call_forms_by_hand_with_an_empty_row(loss, expected):
    logprobs, ref, mask, desirable = token_batch()
    half = jnp.array(0.5)
    np.testing.assert_allclose(loss(logprobs, ref, mask, desirable, half, beta=1.0), expected, rtol=1e-6)
    assert loss(logprobs, ref, jnp.zeros_like(mask), desirable, half, beta=1.0) == 0
    grad = jax.grad(lambda x: loss(x, ref, mask, desirable, half, beta=1.0))(logprobs)
    assert jnp.all(jnp.isfinite(grad)) and grad[0, 1] < 0 < grad[1, 1] and not jnp.any(grad[2])
