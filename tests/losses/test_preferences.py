"""Pairwise preference losses against numbers worked by hand, a torch re-derivation and their own identities."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rljax.losses.preferences import (
    apo_down,
    apo_zero,
    cdpo,
    dpo,
    dpo_loss,
    exo,
    hinge,
    ipo,
    nca,
    robust_dpo,
    sequence_log_ratio,
    smoothed_sigmoid,
    sppo_hard,
    valid_pairs,
)

pytestmark = pytest.mark.fast

# r_w = -1 - (-2) = 1, r_l = -3 - (-2) = -1, Δ = 2. At β = .5: βΔ = 1, βr_w = .5, βr_l = -.5. At β = .25: βΔ = .5.
PAIR = tuple(jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0))
# log σ(1) = -.3132617, log σ(-1) = -1.3132617, log σ(.5) = -.4740770, log σ(-.5) = -.9740770,
# σ(1) = .7310586, σ(.5) = .6224593.
BY_HAND = {
    "dpo": (dpo, 0.5, {}, 0.3132617),
    # .9 * .3132617 + .1 * 1.3132617
    "cdpo": (cdpo, 0.5, {"label_smoothing": 0.1}, 0.4132617),
    # (.9 * .3132617 - .1 * 1.3132617) / .8
    "robust_dpo": (robust_dpo, 0.5, {"label_smoothing": 0.1}, 0.1882617),
    # (2 - 1/(2 * .25))^2 = 0 at β = .25; at β = .5 (2 - 1)^2
    "ipo": (ipo, 0.5, {}, 1.0),
    # 1 - .5
    "hinge": (hinge, 0.25, {}, 0.5),
    # .7310586 (-.3132617 - ln .9) + .2689414 (-1.3132617 - ln .1) = -.1519880 + .2660700
    "exo": (exo, 0.5, {"label_smoothing": 0.1}, 0.1140820),
    # .4740770 + .5 * .9740770 + .5 * .4740770
    "nca": (nca, 0.5, {}, 1.1981540),
    # (1 - 2)^2 + (-1 + 2)^2
    "sppo_hard": (sppo_hard, 0.25, {}, 2.0),
    # (1 - .6224593) + (1 - .6224593)
    "apo_zero": (apo_zero, 0.5, {}, 0.7550813),
    # .6224593 + 1 - .7310586
    "apo_down": (apo_down, 0.5, {}, 0.8914007),
}


def torch_loss(name, chosen, rejected, ref_chosen, ref_rejected, beta, eps=0.1):
    """The equations once more, in torch and in probabilities where that is another route."""
    r_w, r_l = chosen - ref_chosen, rejected - ref_rejected
    win = torch.sigmoid(beta * (r_w - r_l))
    bce = torch.nn.functional.binary_cross_entropy
    one, sure = torch.ones_like(win), torch.full_like(win, 1 - eps)
    return {
        "dpo": lambda: bce(win, one, reduction="none"),
        "cdpo": lambda: bce(win, sure, reduction="none"),
        "robust_dpo": lambda: ((1 - eps) * -torch.log(win) - eps * -torch.log(1 - win)) / (1 - 2 * eps),
        "ipo": lambda: (r_w - r_l - 0.5 / beta) ** 2,
        "hinge": lambda: torch.clamp(1 - beta * (r_w - r_l), min=0),
        "exo": lambda: win * torch.log(win / (1 - eps)) + (1 - win) * torch.log((1 - win) / eps),
        "nca": lambda: (
            -torch.log(torch.sigmoid(beta * r_w))
            - 0.5 * torch.log(1 - torch.sigmoid(beta * r_w))
            - 0.5 * torch.log(1 - torch.sigmoid(beta * r_l))
        ),
        "sppo_hard": lambda: (r_w - 0.5 / beta) ** 2 + (r_l + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - torch.sigmoid(beta * r_w) + torch.sigmoid(beta * r_l),
        "apo_down": lambda: torch.sigmoid(beta * r_w) + 1 - torch.sigmoid(beta * (r_w - r_l)),
    }[name]()


@pytest.mark.parametrize("name", BY_HAND)
def test_pairwise_losses_by_hand(name):
    loss, beta, options, expected = BY_HAND[name]
    np.testing.assert_allclose(loss(*PAIR, beta=beta, **options), [expected], atol=2e-7, rtol=0)


@pytest.mark.parametrize("name", BY_HAND)
def test_pairwise_losses_and_gradients_equal_torch(name):
    loss, beta, options, _ = BY_HAND[name]
    arrays = -np.random.default_rng(0).gamma(2.0, 3.0, (4, 64))  # float64
    with jax.enable_x64(True):
        args = [jnp.asarray(a) for a in arrays]
        values = loss(*args, beta=beta, **options)
        grads = jax.grad(lambda *a: jnp.sum(loss(*a, beta=beta, **options)), argnums=(0, 1))(*args)
        assert values.dtype == jnp.float64
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    expected = torch_loss(name, *tensors, beta)
    expected.sum().backward()
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-9, atol=1e-11)
    for grad, tensor in zip(grads, tensors[:2], strict=True):
        np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-8, atol=1e-11)


def test_dpo_starts_at_ln_2_and_its_gradient_pushes_the_sides_apart():
    logprobs = jnp.array([-5.0, -7.0]), jnp.array([-6.0, -2.0])
    np.testing.assert_allclose(dpo(*logprobs, *logprobs, beta=0.1), math.log(2), rtol=1e-6)
    # d/dl_w of -log σ(βΔ) is -β σ(-βΔ) = -.1 * .5 at Δ = 0.
    grads = jax.grad(lambda w, l: jnp.sum(dpo(w, l, *logprobs, beta=0.1)), argnums=(0, 1))(*logprobs)
    np.testing.assert_allclose(grads[0], [-0.05, -0.05], rtol=1e-6)
    np.testing.assert_allclose(grads[1], [0.05, 0.05], rtol=1e-6)


def test_log_ratio_and_smoothed_sigmoid():
    np.testing.assert_array_equal(sequence_log_ratio(jnp.array([-1.0]), jnp.array([-3.0])), [2.0])
    assert sequence_log_ratio(jnp.array([-1.0], jnp.bfloat16), jnp.array([-3.0], jnp.bfloat16)).dtype == jnp.float32
    # .75 * .3132617 + .25 * 1.3132617
    np.testing.assert_allclose(smoothed_sigmoid(jnp.array(1.0), 0.25), 0.5632617, atol=2e-7)


def test_robust_dpo_is_unbiased_under_flipped_labels():
    """(1-ε) L(w, l) + ε L(l, w) of the noisy labels is DPO's loss of the clean ones."""
    w, l, ref_w, ref_l = PAIR
    noisy = partial(robust_dpo, beta=0.5, label_smoothing=0.2)
    np.testing.assert_allclose(
        0.8 * noisy(w, l, ref_w, ref_l) + 0.2 * noisy(l, w, ref_l, ref_w), dpo(*PAIR, beta=0.5), rtol=1e-6
    )


def test_exo_is_zero_where_the_policy_is_as_sure_as_the_label():
    # σ(βΔ) = 1 - ε at βΔ = log((1-ε)/ε)
    chosen = jnp.array([math.log(0.9 / 0.1)])
    loss = partial(exo, beta=1.0, label_smoothing=0.1)
    zero = jnp.zeros(1)
    value, grad = jax.value_and_grad(lambda c: loss(c, zero, zero, zero)[0])(chosen)
    np.testing.assert_allclose([value, grad[0]], [0, 0], atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 1.0, -0.1])
def test_exo_refuses_certain_labels(label_smoothing):
    with pytest.raises(ValueError, match="infinite"):
        exo(*PAIR, beta=0.5, label_smoothing=label_smoothing)


@pytest.mark.parametrize("label_smoothing", [0.5, 0.7, -0.1])
def test_robust_dpo_refuses_labels_that_say_nothing(label_smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        robust_dpo(*PAIR, beta=0.5, label_smoothing=label_smoothing)


def token_batch():
    """Two pairs and one whose rejected side is empty; NaN wherever the mask is False."""
    nan = jnp.nan
    chosen = jnp.array([[nan, -1.0, -2.0], [nan, -4.0, nan], [nan, -9.0, -9.0]])
    rejected = jnp.array([[nan, -2.0], [nan, -1.0], [nan, nan]])
    ref_chosen = jnp.array([[nan, -2.0, -2.0], [nan, -5.0, nan], [nan, -1.0, -1.0]])
    ref_rejected = jnp.array([[nan, -1.0], [nan, -1.0], [nan, nan]])
    return chosen, rejected, ref_chosen, ref_rejected, ~jnp.isnan(chosen), ~jnp.isnan(rejected)


def test_dpo_loss_by_hand_with_an_empty_side():
    # Pair 0: r_w = -3 + 4 = 1, r_l = -2 + 1 = -1, βΔ = 1. Pair 1: r_w = 1, r_l = 0, βΔ = .5. Pair 2 is not counted.
    np.testing.assert_allclose(dpo_loss(*token_batch(), beta=0.5), (0.3132617 + 0.4740770) / 2, rtol=1e-6)
    # 90 % of that plus 10 % of -log σ(-1) and -log σ(-.5).
    smoothed = dpo_loss(*token_batch(), beta=0.5, pairwise=partial(cdpo, label_smoothing=0.1))
    np.testing.assert_allclose(smoothed, (0.9 * (0.3132617 + 0.4740770) + 0.1 * (1.3132617 + 0.9740770)) / 2, rtol=1e-6)
    # Means: pair 0 r_w = 1/2, r_l = -1, Δ = 1.5; pair 1 Δ = 1. IPO at β = .5: (1.5 - 1)^2 and (1 - 1)^2.
    np.testing.assert_allclose(dpo_loss(*token_batch(), beta=0.5, pairwise=ipo, average=True), 0.125, rtol=1e-6)


def test_dpo_loss_has_finite_gradients_where_masked_entries_are_nan():
    *logprobs, chosen_mask, rejected_mask = token_batch()
    for average in (False, True):
        grads = jax.grad(
            lambda *a, average=average: dpo_loss(*a, chosen_mask, rejected_mask, beta=0.5, average=average),
            argnums=(0, 1),
        )(*logprobs)
        assert all(jnp.all(jnp.isfinite(g)) for g in grads)
        assert grads[0][0, 1] < 0 < grads[1][0, 1]
        assert not jnp.any(grads[0][2])


def test_dpo_loss_of_no_pairs_is_0():
    *logprobs, chosen_mask, rejected_mask = token_batch()
    assert dpo_loss(*logprobs, jnp.zeros_like(chosen_mask), rejected_mask, beta=0.5) == 0


def test_valid_pairs_need_both_sides():
    *_, chosen_mask, rejected_mask = token_batch()
    np.testing.assert_array_equal(valid_pairs(chosen_mask, rejected_mask), [True, True, False])


def test_length_normalized_dpo_is_dpo_of_mean_logprobs():
    """Tülu 3's dpo_norm: every sum over its own length; a completion repeated token by token changes nothing."""
    chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask = token_batch()
    twice = [jnp.repeat(x, 2, axis=1) for x in (chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask)]
    np.testing.assert_allclose(
        dpo_loss(*twice, beta=5.0, average=True), dpo_loss(*token_batch(), beta=5.0, average=True), rtol=1e-6
    )
    assert abs(dpo_loss(*twice, beta=0.5) - dpo_loss(*token_batch(), beta=0.5)) > 0.01


@pytest.mark.parametrize("name", BY_HAND)
def test_pairwise_losses_stay_finite_far_from_the_reference(name):
    loss, beta, options, _ = BY_HAND[name]
    far = [jnp.array([x, -x]) for x in (-9000.0, 9000.0, 9000.0, -9000.0)]
    values, grads = jax.value_and_grad(lambda w: jnp.sum(loss(w, *far[1:], beta=beta, **options)))(far[0])
    assert jnp.isfinite(values) and jnp.all(jnp.isfinite(grads))
