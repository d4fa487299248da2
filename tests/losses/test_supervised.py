"""Cross-entropy, label smoothing, z-loss and DFT against numbers worked by hand and torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rljax.losses.supervised import (
    cross_entropy,
    dft,
    dft_loss,
    mean_logprob,
    sft_loss,
    smoothed_cross_entropy,
    z_loss,
)

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(5)
NAN = jnp.nan
LOGPROBS = jnp.array([[NAN, -1.0, -2.0], [NAN, -4.0, -jnp.inf], [NAN, NAN, NAN]])
MASK = jnp.array([[False, True, True], [False, True, False], [False, False, False]])


def test_cross_entropy_by_hand():
    numerator, denominator = cross_entropy(LOGPROBS, MASK)
    assert (numerator, denominator) == (7.0, 3.0)
    assert cross_entropy(LOGPROBS, jnp.zeros_like(MASK)) == (0, 0)
    np.testing.assert_allclose(sft_loss(LOGPROBS, MASK), 7 / 3, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(sft_loss)(LOGPROBS, MASK), jnp.where(MASK, -1 / 3, 0), rtol=1e-6)
    assert sft_loss(LOGPROBS, jnp.zeros_like(MASK)) == 0


def test_cross_entropy_adds_over_micro_batches():
    """Rows of unequal length: sums over sums, where a mean of means would differ."""
    parts = [cross_entropy(LOGPROBS[i : i + 1], MASK[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(sum(n for n, _ in parts) / sum(d for _, d in parts), sft_loss(LOGPROBS, MASK), rtol=1e-6)


def test_mean_logprob_by_hand():
    """p = (1/2, 1/4, 1/4) and a masked entry: (ln 1/2 + 2 ln 1/4) / 3."""
    logits = jnp.array([math.log(2), 0.0, 0.0, -jnp.inf])
    np.testing.assert_allclose(mean_logprob(logits), -5 / 3 * math.log(2), rtol=1e-6)


def test_smoothed_cross_entropy_by_hand():
    # p = (1/2, 1/4, 1/4), ε = .3: -.7 ln(1/2) - .3 (ln(1/2) + 2 ln(1/4)) / 3 = ln 2 (.7 + .3 * 5/3)
    logits = jnp.array([math.log(2), 0.0, 0.0])
    expected = math.log(2) * 1.2
    np.testing.assert_allclose(smoothed_cross_entropy(logits, jnp.array(0), label_smoothing=0.3), expected, rtol=1e-6)
    # A padded vocabulary entry changes neither the mean nor the gradient.
    padded = jnp.append(logits, -jnp.inf)
    value, grad = jax.value_and_grad(lambda z: smoothed_cross_entropy(z, jnp.array(0), label_smoothing=0.3))(padded)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    # p - (1-ε) 1[y] - ε/3
    np.testing.assert_allclose(grad, [0.5 - 0.7 - 0.1, 0.25 - 0.1, 0.25 - 0.1, 0], atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_smoothed_cross_entropy_equals_torch(label_smoothing):
    logits, tokens = RNG.normal(size=(32, 11)) * 3, RNG.integers(0, 11, 32)
    tensor = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        tensor, torch.tensor(tokens), label_smoothing=label_smoothing, reduction="none"
    )
    expected.sum().backward()
    with jax.enable_x64(True):
        args = jnp.asarray(logits), jnp.asarray(tokens)
        values = smoothed_cross_entropy(*args, label_smoothing=label_smoothing)
        grad = jax.grad(lambda z: jnp.sum(smoothed_cross_entropy(z, args[1], label_smoothing=label_smoothing)))(args[0])
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_z_loss_by_hand():
    # Z = 2 + 1 + 1 = 4; d/dz_v log² Z = 2 log Z p_v
    logits = jnp.array([math.log(2), 0.0, 0.0, -jnp.inf])
    value, grad = jax.value_and_grad(z_loss)(logits)
    np.testing.assert_allclose(value, math.log(4) ** 2, rtol=1e-6)
    np.testing.assert_allclose(grad, 2 * math.log(4) * np.array([0.5, 0.25, 0.25, 0]), rtol=1e-6)


def test_dft_by_hand():
    # p = 1/2: ½ ln 2; the gradient in log p is -p, that of the probability itself.
    value, grad = jax.value_and_grad(dft)(jnp.array(math.log(0.5)))
    np.testing.assert_allclose([value, grad], [0.5 * math.log(2), -0.5], rtol=1e-6)


def test_dft_gradient_in_the_logits_is_that_of_minus_the_probability():
    logits = jnp.asarray(RNG.normal(size=7), jnp.float32)
    ours = jax.grad(lambda z: dft(jax.nn.log_softmax(z)[3]))(logits)
    np.testing.assert_allclose(ours, jax.grad(lambda z: -jax.nn.softmax(z)[3])(logits), atol=1e-6)


def test_dft_loss_by_hand_with_masked_nan():
    # (e^-1 * 1 + e^-2 * 2 + e^-4 * 4) / 3
    value, grad = jax.value_and_grad(dft_loss)(LOGPROBS, MASK)
    np.testing.assert_allclose(value, (math.exp(-1) + 2 * math.exp(-2) + 4 * math.exp(-4)) / 3, rtol=1e-6)
    assert jnp.all(jnp.isfinite(grad)) and not jnp.any(grad[~MASK])
    assert dft_loss(LOGPROBS, jnp.zeros_like(MASK)) == 0
