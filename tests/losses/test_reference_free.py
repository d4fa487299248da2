"""SimPO, CPO and ORPO against numbers worked by hand and a torch re-derivation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rljax.losses.reference_free import cpo, cpo_loss, orpo, orpo_loss, simpo, simpo_loss

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(2)


def test_simpo_by_hand():
    # β(l̄_w - l̄_l) - γ = 2 (-1 + 2) - 1 = 1; -log σ(1)
    np.testing.assert_allclose(simpo(jnp.array([-1.0]), jnp.array([-2.0]), beta=2.0, gamma=1.0), [0.3132617], rtol=1e-6)


def test_cpo_by_hand():
    # -log σ(.5 (-1 + 3)) + 2 * 1
    np.testing.assert_allclose(
        cpo(jnp.array([-1.0]), jnp.array([-3.0]), beta=0.5, nll_coef=2.0), [2.3132617], rtol=1e-6
    )


def test_orpo_by_hand():
    # q_w = 1/2, odds 1; q_l = 1/5, odds 1/4: odds ratio 4, σ(log 4) = 4/5. ln 2 + .1 ln 1.25
    expected = math.log(2) + 0.1 * math.log(1.25)
    args = jnp.array([math.log(0.5)]), jnp.array([math.log(0.2)])
    np.testing.assert_allclose(orpo(*args, odds_coef=0.1), [expected], rtol=1e-6)


def test_losses_and_gradients_equal_torch():
    """SimPO, CPO and ORPO in probabilities and odds, float64."""
    chosen, rejected = -RNG.gamma(2.0, 0.5, (2, 64))

    def odds(x):
        return torch.exp(x) / (1 - torch.exp(x))

    cases = [
        (lambda w, l: simpo(w, l, beta=2.0, gamma=0.5), lambda w, l: -torch.log(torch.sigmoid(2 * (w - l) - 0.5))),
        (lambda w, l: cpo(w, l, beta=0.1), lambda w, l: torch.log(1 + torch.exp(0.1 * (l - w))) - w),
        (
            lambda w, l: orpo(w, l, odds_coef=0.3),
            lambda w, l: -w - 0.3 * torch.log(odds(w) / (odds(w) + odds(l))),
        ),
    ]
    for ours, theirs in cases:
        tensors = [torch.tensor(x, requires_grad=True) for x in (chosen, rejected)]
        expected = theirs(*tensors)
        expected.sum().backward()
        with jax.enable_x64(True):
            args = jnp.asarray(chosen), jnp.asarray(rejected)
            values = ours(*args)
            grads = jax.grad(lambda w, l, ours=ours: jnp.sum(ours(w, l)), argnums=(0, 1))(*args)
        np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-9)
        for grad, tensor in zip(grads, tensors, strict=True):
            np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-8, atol=1e-12)


def test_orpo_is_finite_at_certainty_and_impossibility():
    args = jnp.array([0.0, -1e-9, -200.0]), jnp.array([-200.0, 0.0, 0.0])
    value, grads = jax.value_and_grad(lambda w, l: jnp.sum(orpo(w, l, odds_coef=0.1)), argnums=(0, 1))(*args)
    assert jnp.isfinite(value) and all(jnp.all(jnp.isfinite(g)) for g in grads)


def token_batch():
    """One pair, one pair with an empty rejected side; NaN wherever the mask is False."""
    nan = jnp.nan
    chosen = jnp.array([[nan, -1.0, -2.0], [nan, -4.0, nan]])
    rejected = jnp.array([[-2.0, nan], [nan, nan]])
    return chosen, rejected, ~jnp.isnan(chosen), ~jnp.isnan(rejected)


# Pair 0: l_w = -3, l̄_w = -1.5, l_l = l̄_l = -2.
ONE_CALL = {
    # -log σ(2 * .5 - .5)
    "simpo": (lambda *a: simpo_loss(*a, beta=2.0, gamma=0.5), 0.4740770),
    # -log σ(-.5 * -1 * -1) + 3
    "cpo": (lambda *a: cpo_loss(*a, beta=0.5), 0.9740770 + 3.0),
    # o = l - log(1 - e^l): -1.5 + .2524837 = -1.2475163 and -2 + .1454135 = -1.8545865; 1.5 + log(1 + e^-.6070702)
    "orpo": (lambda *a: orpo_loss(*a, odds_coef=1.0), 1.5 + math.log1p(math.exp(-0.6070702))),
}


@pytest.mark.parametrize("name", ONE_CALL)
def test_one_call_forms_by_hand_with_an_empty_side(name):
    loss, expected = ONE_CALL[name]
    chosen, rejected, chosen_mask, rejected_mask = token_batch()
    np.testing.assert_allclose(loss(chosen, rejected, chosen_mask, rejected_mask), expected, rtol=1e-6)
    assert loss(chosen, rejected, jnp.zeros_like(chosen_mask), rejected_mask) == 0
    grads = jax.grad(lambda w, l: loss(w, l, chosen_mask, rejected_mask), argnums=(0, 1))(chosen, rejected)
    assert all(jnp.all(jnp.isfinite(g)) for g in grads)
    assert grads[0][0, 1] < 0 < grads[1][0, 0] and not jnp.any(grads[0][1])
