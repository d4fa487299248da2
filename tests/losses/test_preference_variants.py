"""f-DPO, transport, LD-DPO, WPO, TR-DPO, XPO and Nash-MD against numbers worked by hand, torch and enumeration."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rljax.losses.logprobs import sequence_logprobs
from rljax.losses.preference_variants import (
    alpha_score,
    aot,
    aot_unpaired,
    f_dpo,
    forward_kl_score,
    js_score,
    ld_logprobs,
    log_collision,
    match_ranks,
    mix_reference,
    nash_md,
    nash_md_per_token,
    wpo_weights,
    xpo,
)
from rljax.losses.preferences import dpo

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(1)
RATIOS = jnp.linspace(-3.0, 3.0, 13)


# --- f-divergences: s(log u) is f'(u) up to a constant, f' taken by torch from the textbook generator ---


GENERATORS = {
    "forward_kl": (forward_kl_score, lambda u: -torch.log(u)),
    # JS: f(u) = u log u - (1 + u) log((1 + u) / 2)
    "js": (js_score, lambda u: u * torch.log(u) - (1 + u) * torch.log((1 + u) / 2)),
    # α = .3: f(u) = (u^(1-α) - (1-α) u - α) / (α (α - 1))
    "alpha": (partial(alpha_score, alpha=0.3), lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7)),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_scores_are_the_derivatives_of_the_divergences(name):
    score, generator = GENERATORS[name]
    u = torch.tensor(np.exp(np.asarray(RATIOS, np.float64)), requires_grad=True)
    generator(u).sum().backward()
    at_one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    generator(at_one).sum().backward()
    np.testing.assert_allclose(score(RATIOS), (u.grad - at_one.grad).numpy(), rtol=1e-5, atol=1e-5)


def test_alpha_score_between_reverse_and_forward_kl():
    np.testing.assert_allclose(alpha_score(RATIOS, alpha=1.0), forward_kl_score(RATIOS), rtol=1e-6)
    np.testing.assert_allclose(alpha_score(RATIOS, alpha=1e-6), RATIOS, atol=1e-4)
    # e^{(a-1) r} / (a - 1) with a = 1 - α, less its value at r = 0
    a = 0.6
    other = (np.exp((a - 1) * np.asarray(RATIOS)) - 1) / (a - 1)
    np.testing.assert_allclose(alpha_score(RATIOS, alpha=0.4), other, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="use dpo"):
        alpha_score(RATIOS, alpha=0.0)


def test_f_dpo_by_hand():
    pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]  # r_w = 1, r_l = -1
    np.testing.assert_allclose(f_dpo(*pair, beta=0.5, score=lambda r: r), dpo(*pair, beta=0.5))
    # forward KL: s = (1 - e^-1) - (1 - e^1) = 2.3504024; softplus(-.5 * 2.3504024) = log(1 + e^-1.1752012)
    expected = math.log1p(math.exp(-1.1752012))
    np.testing.assert_allclose(f_dpo(*pair, beta=0.5, score=forward_kl_score), [expected], rtol=1e-6)
    # JS: log σ(1) - log σ(-1) = 1, so -log σ(.5)
    np.testing.assert_allclose(f_dpo(*pair, beta=0.5, score=js_score), [0.4740770], rtol=1e-6)


@pytest.mark.parametrize("score", [forward_kl_score, js_score, partial(alpha_score, alpha=0.5)])
def test_f_dpo_is_finite_far_from_the_reference(score):
    far = [jnp.array([x]) for x in (-900.0, -300.0, -1.0, -1.0)]
    value, grad = jax.value_and_grad(lambda w: jnp.sum(f_dpo(w, *far[1:], beta=0.1, score=score)))(far[0])
    assert jnp.isfinite(value) and jnp.isfinite(grad[0])


# --- AOT ---


def test_match_ranks_by_hand():
    # values have ranks 2, 0, 1; others in order are -1, 5, 7.
    np.testing.assert_array_equal(match_ranks(jnp.array([9.0, 1.0, 4.0]), jnp.array([5.0, 7.0, -1.0])), [7, -1, 5])
    mask = jnp.array([True, False, True])
    matched = match_ranks(jnp.array([9.0, jnp.nan, 4.0]), jnp.array([5.0, jnp.nan, -1.0]), mask)
    np.testing.assert_array_equal(matched, [5, 0, -1])


def torch_aot(first, second, beta, eps):
    delta = torch.sort(first)[0] - torch.sort(second)[0]
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    return bce(beta * delta, torch.full_like(delta, 1 - eps), reduction="sum")


def test_aot_sum_and_gradient_are_those_of_the_sorted_lists():
    chosen, rejected, ref_chosen, ref_rejected = -RNG.gamma(2.0, 3.0, (4, 32))
    tensors = [torch.tensor(x, requires_grad=True) for x in (chosen, rejected)]
    expected = torch_aot(tensors[0] - tensors[1], torch.tensor(ref_chosen - ref_rejected), 0.3, 0.1)
    expected.backward()
    with jax.enable_x64(True):
        matched = match_ranks(jnp.asarray(chosen - rejected), jnp.asarray(ref_chosen - ref_rejected))
        value, grads = jax.value_and_grad(
            lambda w, l: jnp.sum(aot(w, l, matched, beta=0.3, label_smoothing=0.1)), argnums=(0, 1)
        )(jnp.asarray(chosen), jnp.asarray(rejected))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-10)
    for grad, tensor in zip(grads, tensors, strict=True):
        np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_aot_unpaired_sum_and_gradient_are_those_of_the_sorted_lists_for_any_cut():
    chosen, rejected = RNG.normal(size=(2, 32))
    tensors = [torch.tensor(x, requires_grad=True) for x in (chosen, rejected)]
    expected = torch_aot(*tensors, 0.3, 0.0)
    expected.backward()
    with jax.enable_x64(True):
        chosen, rejected = jnp.asarray(chosen), jnp.asarray(rejected)
        matched_rejected, matched_chosen = match_ranks(chosen, rejected), match_ranks(rejected, chosen)

        def in_micro_batches(chosen, rejected):
            rows = (chosen, rejected, matched_rejected, matched_chosen)
            return sum(jnp.sum(aot_unpaired(*(x[i : i + 8] for x in rows), beta=0.3)) for i in range(0, 32, 8))

        value, grads = jax.value_and_grad(in_micro_batches, argnums=(0, 1))(chosen, rejected)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-10)
    for grad, tensor in zip(grads, tensors, strict=True):
        np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-9, atol=1e-12)


# --- LD-DPO and WPO ---


def test_ld_logprobs_by_hand():
    nan = jnp.nan
    logprobs = jnp.array([[nan, -1.0, -2.0, -4.0], [nan, -1.0, nan, -3.0], [nan, nan, nan, nan]])
    mask = ~jnp.isnan(logprobs)
    other = jnp.array([[True, True, False], [True, True, True], [True, True, True]])
    # Row 0: 3 tokens against 2: -1 - 2 - 4α. Row 1: 2 against 3, all shared, a gap in the mask. Row 2: nothing.
    np.testing.assert_allclose(ld_logprobs(logprobs, mask, other, alpha=0.5), [-5.0, -4.0, 0.0])
    np.testing.assert_allclose(ld_logprobs(logprobs, mask, other, alpha=1.0), sequence_logprobs(logprobs, mask))
    grad = jax.grad(lambda x: jnp.sum(ld_logprobs(x, mask, other, alpha=0.5)))(logprobs)
    np.testing.assert_allclose(grad, [[0, 1, 1, 0.5], [0, 1, 0, 1], [0, 0, 0, 0]])


def test_log_collision_by_hand():
    # Uniform over 4: Σ p² = 1/4. (.5, .25, .25): .25 + .0625 + .0625 = .375. A padded vocabulary entry is absent.
    np.testing.assert_allclose(log_collision(jnp.zeros(4)), math.log(0.25), rtol=1e-6)
    logits = jnp.array([math.log(2), 0.0, 0.0, -jnp.inf])
    np.testing.assert_allclose(log_collision(logits), math.log(0.375), rtol=1e-6)
    # At temperature 1/2 the weights square: (4, 1, 1)/6, Σ p² = 18/36.
    np.testing.assert_allclose(log_collision(logits, 0.5), math.log(0.5), rtol=1e-6)


def test_wpo_weights_by_hand():
    nan = jnp.nan
    chosen = jnp.array([[-1.0, -3.0], [-1.0, nan]])
    rejected = jnp.array([[-2.0, nan], [nan, nan]])
    collisions = jnp.full((2, 2), -1.0)
    args = (chosen, rejected, collisions, collisions, ~jnp.isnan(chosen), ~jnp.isnan(rejected))
    # Pair 0: mean(0, -2) + mean(-1) = -2. Pair 1: chosen mean 0, empty side 0.
    np.testing.assert_allclose(wpo_weights(*args), [math.exp(-2), 1.0], rtol=1e-6)
    grads = jax.grad(lambda x: jnp.sum(wpo_weights(x, *args[1:])))(chosen)
    np.testing.assert_array_equal(grads, 0)


def test_wpo_weights_of_sampled_tokens_average_to_one():
    """Σ_v π_v · π_v / Σ π² = 1: the weight of a single token sampled from the policy is 1 on average (alignment)."""
    logits = jnp.asarray(RNG.normal(size=5), jnp.float32)
    logprobs = jax.nn.log_softmax(logits)
    tokens = logprobs[:, None], jnp.zeros((5, 1)), jnp.full((5, 1), log_collision(logits)), jnp.zeros((5, 1))
    weights = wpo_weights(*tokens, jnp.ones((5, 1), bool), jnp.zeros((5, 1), bool))
    np.testing.assert_allclose(jnp.sum(jnp.exp(logprobs) * weights), 1.0, rtol=1e-5)


# --- TR-DPO, XPO, Nash-MD ---


def test_mix_reference_by_hand():
    reference = {"w": jnp.array([1.0, 2.0], jnp.bfloat16), "b": jnp.array(4.0)}
    policy = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(0.0)}
    mixed = mix_reference(reference, policy, alpha=0.25)
    np.testing.assert_array_equal(mixed["w"].astype(jnp.float32), [1.5, 1.5])  # .25 * 3 + .75 * 1, .75 * 2
    assert mixed["b"] == 3.0 and mixed["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(mix_reference(reference, policy, alpha=1.0)["b"], policy["b"])
    np.testing.assert_array_equal(mix_reference(reference, policy, alpha=0.0)["w"], reference["w"])


def test_xpo_by_hand():
    pair = [jnp.array([x]) for x in (-1.0, -3.0, -2.0, -2.0)]
    explore = jnp.array([-3.0])
    np.testing.assert_allclose(xpo(*pair, explore, beta=0.5, alpha=0.1), [0.3132617 - 0.3], rtol=1e-5)
    # The bonus lowers log π(ỹ): its gradient is +α.
    assert jax.grad(lambda e: xpo(*pair, e, beta=0.5, alpha=0.1)[0])(explore)[0] == jnp.float32(0.1)


def sequences(length, vocabulary):
    return np.array(list(itertools.product(range(vocabulary), repeat=length)))


def token_table(logits, tokens):
    """Log-probs [n, 2] of two-token sequences under first-token logits [v] and second-token logits [v, v]."""
    first, second = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(logits[1:], axis=-1)
    return jnp.stack([first[tokens[:, 0]], second[tokens[:, 0], tokens[:, 1]]], axis=1)


def nash_objective(logits, ref_logits, tokens, preference, beta):
    """-E_π[p(y)] + β KL(π ‖ ref), by enumeration."""
    logprobs, ref = token_table(logits, tokens).sum(1), token_table(ref_logits, tokens).sum(1)
    return jnp.sum(jnp.exp(logprobs) * (-preference + beta * (logprobs - ref)))


def test_nash_md_gradient_is_that_of_the_regularized_preference():
    tokens = sequences(2, 3)
    with jax.enable_x64(True):
        logits, ref_logits = jnp.asarray(RNG.normal(size=(2, 4, 3)))
        preference = jnp.asarray(RNG.uniform(size=9))
        probabilities = jnp.exp(token_table(logits, tokens).sum(1))
        ref = token_table(ref_logits, tokens)

        def expected_loss(loss):
            return jax.grad(lambda p: jnp.sum(probabilities * loss(token_table(p, tokens))))(logits)

        sequence = expected_loss(lambda lp: nash_md(lp.sum(1), ref.sum(1), preference, beta=0.7))
        mask = jnp.ones((9, 2), bool)
        per_token = expected_loss(lambda lp: nash_md_per_token(lp, ref, preference, mask, beta=0.7))
        exact = jax.grad(nash_objective)(logits, ref_logits, tokens, preference, 0.7)
    np.testing.assert_allclose(sequence, exact, atol=1e-12)
    # Token by token, the first token does not answer for the KL of the second; the second-token logits agree.
    np.testing.assert_allclose(per_token[1:], exact[1:], atol=1e-12)
    assert np.abs(per_token[0] - exact[0]).max() > 1e-3


def test_nash_md_per_token_by_hand():
    nan = jnp.nan
    logprobs = jnp.array([[nan, -1.0, -2.0], [nan, nan, nan]])
    ref = jnp.array([[nan, -3.0, -2.0], [nan, nan, nan]])
    preference, mask = jnp.array([0.9, 0.9]), ~jnp.isnan(logprobs)
    # -(.4)(-3) + .5 * (2 * -1 + 0 * -2) = 1.2 - 1
    loss, grad = jax.vmap(
        jax.value_and_grad(lambda lp, *rest: nash_md_per_token(lp[None], *(x[None] for x in rest), beta=0.5)[0])
    )(logprobs, ref, preference, mask)
    np.testing.assert_allclose(loss, [0.2, 0.0], atol=1e-6)
    # -(.4) + .5 * 2, -(.4)
    np.testing.assert_allclose(grad, [[0, 0.6, -0.4], [0, 0, 0]], atol=1e-6)


def test_nash_md_by_hand():
    # -(.9 - .5 - .5 * (-3 + 5)) * -3 = .6 * -3
    args = jnp.array([-3.0]), jnp.array([-5.0]), jnp.array([0.9])
    np.testing.assert_allclose(nash_md(*args, beta=0.5), [-1.8], rtol=1e-6)
