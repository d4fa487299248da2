"""Reward model losses by hand, over all rankings, by recovery of a known θ; pessimism where data is thin."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rljax.losses.reward_models import (
    add_comparisons,
    binary_cross_entropy,
    bradley_terry,
    bradley_terry_loss,
    centering_penalty,
    empty_covariance,
    outcome_loss,
    pairwise_split,
    pessimistic_rewards,
    plackett_luce,
    plackett_luce_loss,
    process_loss,
    rank_order,
    rankings,
    reward_bias,
)

RNG = np.random.default_rng(4)


# --- Pairs ---


def test_bradley_terry_by_hand():
    chosen, rejected = jnp.array([2.0, 1.0]), jnp.array([1.0, 1.0])
    # -log σ(1), -log σ(0)
    np.testing.assert_allclose(bradley_terry(chosen, rejected), [0.3132617, math.log(2)], rtol=1e-6)
    # margins 2 and 0: -log σ(-1)
    np.testing.assert_allclose(
        bradley_terry(chosen, rejected, jnp.array([2.0, 0.0])), [1.3132617, math.log(2)], rtol=1e-6
    )
    np.testing.assert_array_equal(centering_penalty(chosen, rejected), [9.0, 4.0])


def test_bradley_terry_loss_by_hand_with_a_masked_pair():
    chosen, rejected = jnp.array([2.0, 1.0, jnp.nan]), jnp.array([1.0, 1.0, jnp.inf])
    mask = jnp.array([True, True, False])
    # ((.3132617 + .1 * 9) + (.6931472 + .1 * 4)) / 2
    value, grad = jax.value_and_grad(lambda r: bradley_terry_loss(r, rejected, mask, centering_coef=0.1))(chosen)
    np.testing.assert_allclose(value, (0.3132617 + 0.9 + 0.6931472 + 0.4) / 2, rtol=1e-6)
    # ½ (-σ(-1) + .2 * 3), ½ (-½ + .2 * 2)
    np.testing.assert_allclose(grad, [(-0.2689414 + 0.6) / 2, -0.05, 0], rtol=1e-5)
    # margins 2 and 0: (-log σ(-1) - log σ(0)) / 2; the masked pair has none.
    margin = jnp.array([2.0, 0.0, jnp.nan])
    value, grad = jax.value_and_grad(lambda r: bradley_terry_loss(r, rejected, mask, margin=margin))(chosen)
    np.testing.assert_allclose(value, (1.3132617 + 0.6931472) / 2, rtol=1e-6)
    np.testing.assert_allclose(grad, [-0.7310586 / 2, -0.25, 0], rtol=1e-6)
    assert bradley_terry_loss(chosen, rejected, jnp.zeros(3, bool)) == 0


def test_bradley_terry_equals_torch():
    chosen, rejected, margin = RNG.normal(size=(3, 64))
    tensor = torch.tensor(chosen, requires_grad=True)
    expected = torch.nn.functional.softplus(torch.tensor(rejected) + torch.tensor(margin) - tensor)
    expected.sum().backward()
    with jax.enable_x64(True):
        args = jnp.asarray(rejected), jnp.asarray(margin)
        values = bradley_terry(jnp.asarray(chosen), *args)
        grad = jax.grad(lambda r: jnp.sum(bradley_terry(r, *args)))(jnp.asarray(chosen))
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-10)


# --- Rankings ---


def choice_probability(rewards):
    """P(this order) as a product of choices of the best among those left, one at a time."""
    weights = np.exp(np.asarray(rewards, np.float64))
    return math.prod(weights[i] / weights[i:].sum() for i in range(len(weights)))


def test_plackett_luce_over_all_orders():
    rewards = RNG.normal(size=4)
    orders = np.array([rewards[list(order)] for order in itertools.permutations(range(4))])
    losses = plackett_luce(jnp.asarray(orders, jnp.float32), jnp.ones(orders.shape, bool))
    np.testing.assert_allclose(np.exp(-np.asarray(losses)), [choice_probability(r) for r in orders], rtol=1e-5)
    np.testing.assert_allclose(np.exp(-np.asarray(losses, np.float64)).sum(), 1, rtol=1e-6)


def test_plackett_luce_of_two_is_bradley_terry():
    rewards = jnp.asarray(RNG.normal(size=(64, 2)), jnp.float32)
    mask = jnp.ones((64, 2), bool)
    np.testing.assert_allclose(plackett_luce(rewards, mask), bradley_terry(*rewards.T), atol=1e-7)
    np.testing.assert_allclose(pairwise_split(rewards, mask), bradley_terry(*rewards.T), atol=1e-7)


def test_rankings_by_hand():
    rewards = jnp.array([[math.log(3), 0.0, 0.0], [0.0, 7.0, 0.0], [5.0, 1.0, 2.0]])
    mask = jnp.array([[True, True, True], [True, False, True], [True, False, False]])
    # Row 0: 3/5 then 1/2: ln(10/3). Row 1: two equal answers, ln 2. Row 2: nothing to rank.
    np.testing.assert_allclose(plackett_luce(rewards, mask), [math.log(10 / 3), math.log(2), 0], rtol=1e-6)
    # Row 0: pairs 3/4, 3/4, 1/2, over C(3, 2) = 3.
    split = [(2 * math.log(4 / 3) + math.log(2)) / 3, math.log(2), 0]
    np.testing.assert_allclose(pairwise_split(rewards, mask), split, rtol=1e-6)
    np.testing.assert_array_equal(rankings(mask), [True, True, False])
    np.testing.assert_allclose(plackett_luce_loss(rewards, mask), (math.log(10 / 3) + math.log(2)) / 2, rtol=1e-6)
    assert plackett_luce_loss(rewards, jnp.zeros_like(mask)) == 0


@pytest.mark.parametrize("loss", [plackett_luce, pairwise_split])
def test_ragged_rankings_are_the_rankings_without_the_masked_answers(loss):
    rewards = RNG.normal(size=(1, 4)).astype(np.float32)
    value_and_grad = jax.jit(jax.value_and_grad(lambda r, mask: jnp.sum(loss(r, mask))))
    for kept in itertools.product([False, True], repeat=4):
        mask = np.array([kept])
        value, grad = value_and_grad(np.where(mask, rewards, np.nan), mask)
        # The kept answers moved to the front, the rest 0 and masked as well.
        k = mask.sum()
        front = np.append(rewards[mask], np.zeros(4 - k, np.float32))[None]
        expected, expected_grad = value_and_grad(front, np.arange(4)[None] < k)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grad[mask], expected_grad[0, :k], rtol=1e-5, atol=1e-6)
        assert not np.any(grad[~mask])
        if loss is plackett_luce:
            np.testing.assert_allclose(np.exp(-value), choice_probability(front[0, :k]), rtol=1e-5)


def test_plackett_luce_is_stable_at_large_rewards():
    rewards = jnp.array([[-800.0, 0.0, 800.0], [800.0, 0.0, -800.0]])
    value, grad = jax.value_and_grad(lambda r: jnp.sum(plackett_luce(r, jnp.ones((2, 3), bool))))(rewards)
    np.testing.assert_allclose(value, 1600 + 800, rtol=1e-6)
    np.testing.assert_allclose(grad, [[-1, -1, 2], [0, 0, 0]], atol=1e-6)


def test_rank_order_puts_the_best_first_and_the_masked_last():
    scores = jnp.array([[1.0, 3.0, jnp.nan, 2.0, 3.0]])
    np.testing.assert_array_equal(rank_order(scores, ~jnp.isnan(scores)), [[1, 4, 3, 0, 2]])


def recovery_error(loss, sizes, seeds=32, width=3, answers=4):
    """Root mean square over seeds of |θ̂ - θ*| of a linear reward fitted with ``loss`` on n rankings, for each n."""
    everything = jnp.ones((max(sizes), answers), bool)

    def one(key, n):
        keys = jax.random.split(key, 3)
        theta = jax.random.normal(keys[0], (width,))
        features = jax.random.normal(keys[1], (max(sizes), answers, width))
        # Sorting rewards plus Gumbel noise draws a ranking from Plackett-Luce.
        noisy = features @ theta + jax.random.gumbel(keys[2], features.shape[:2])
        ranked = jnp.take_along_axis(features, rank_order(noisy, everything)[..., None], axis=1)

        def objective(t):
            return jnp.sum(jnp.where(jnp.arange(max(sizes)) < n, loss(ranked @ t, everything), 0)) / n

        def newton(t, _):
            return t - jnp.linalg.solve(jax.hessian(objective)(t), jax.grad(objective)(t)), None

        fitted, _ = jax.lax.scan(newton, 0.5 * theta, length=6)
        return jnp.sum(jnp.square(fitted - theta)), jnp.linalg.norm(jax.grad(objective)(fitted))

    over_seeds = jax.jit(jax.vmap(one, in_axes=(0, None)))
    squares, gradients = zip(*(over_seeds(jax.random.split(jax.random.key(0), seeds), n) for n in sizes), strict=True)
    assert jnp.max(jnp.array(gradients)) < 1e-4  # Newton arrived
    return np.sqrt(np.mean(squares, axis=1))


def test_theta_is_recovered_with_error_falling_as_the_root_of_n():
    sizes = (100, 400, 1600)
    whole, split = recovery_error(plackett_luce, sizes), recovery_error(pairwise_split, sizes)
    for errors in (whole, split):
        slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
        assert -0.6 < slope < -0.4, (slope, errors)
    assert whole[-1] < split[-1]  # the split is consistent, less efficient


# --- Outcomes and steps ---


def test_binary_cross_entropy_equals_torch():
    logits, labels = RNG.normal(size=(2, 64)) * 4
    labels = 1 / (1 + np.exp(-labels))
    tensor = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(tensor, torch.tensor(labels), reduction="none")
    expected.sum().backward()
    mask = jnp.ones(64, bool)
    with jax.enable_x64(True):
        values = binary_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), mask)
        grad = jax.grad(lambda z: jnp.sum(binary_cross_entropy(z, jnp.asarray(labels), mask)))(jnp.asarray(logits))
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-10)


def test_outcome_loss_by_hand():
    nan = jnp.nan
    logits = jnp.array([[nan, 1.0, 0.0], [nan, 1.0, nan]])
    mask, correct = ~jnp.isnan(logits), jnp.array([True, False])
    # Row 0, right: -log σ(1), ln 2. Row 1, wrong: -log σ(-1). Three tokens.
    value, grad = jax.value_and_grad(outcome_loss)(logits, correct, mask)
    np.testing.assert_allclose(value, (0.3132617 + 0.6931472 + 1.3132617) / 3, rtol=1e-6)
    np.testing.assert_allclose(grad, np.array([[0, -0.2689414, -0.5], [0, 0.7310586, 0]]) / 3, rtol=1e-5)
    assert outcome_loss(logits, correct, jnp.zeros_like(mask)) == 0


def test_process_loss_by_hand():
    nan = jnp.nan
    logits = jnp.array([[1.0, -1.0], [0.0, nan]])
    labels = jnp.array([[1.0, 0.0], [0.25, nan]])
    # -log σ(1), -log σ(1), and at 0 every label costs ln 2: three steps.
    mask = ~jnp.isnan(logits)
    np.testing.assert_allclose(process_loss(logits, labels, mask), (2 * 0.3132617 + 0.6931472) / 3, rtol=1e-6)
    assert jnp.all(jnp.isfinite(jax.grad(process_loss)(logits, labels, mask)))
    assert process_loss(logits, labels, jnp.zeros_like(mask)) == 0


# --- Pessimism and calibration ---


def test_covariance_is_numpys_for_any_cut():
    differences = RNG.normal(size=(30, 4)).astype(np.float32)
    mask = RNG.uniform(size=30) < 0.6
    covariance = empty_covariance(4)
    for rows in (slice(0, 7), slice(7, 30)):
        part = jnp.where(mask[rows, None], differences[rows], jnp.nan)
        covariance = add_comparisons(covariance, part, jnp.asarray(mask[rows]))
    kept = differences[mask].astype(np.float64)
    np.testing.assert_allclose(covariance.total / covariance.comparisons, kept.T @ kept / len(kept), rtol=1e-5)


def test_pessimistic_rewards_by_hand():
    # Four comparisons along the first axis, difference 2: Σ = diag(4, 0), + .25 I = diag(4.25, .25).
    covariance = add_comparisons(empty_covariance(2), jnp.array([[2.0, 0.0]] * 4), jnp.ones(4, bool))
    features = jnp.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    rewards = pessimistic_rewards(jnp.full(3, 3.0), features, covariance, bound=0.5, ridge=0.25)
    # ‖(2, 0)‖ = 2/√4.25, ‖(0, 2)‖ = 2/√.25 = 4, ‖(1, 1)‖ = √(1/4.25 + 4)
    np.testing.assert_allclose(rewards, [3 - 1 / math.sqrt(4.25), 1, 3 - 0.5 * math.sqrt(1 / 4.25 + 4)], rtol=1e-6)
    at_reference = pessimistic_rewards(
        jnp.ones(3), features, covariance, bound=0.5, ridge=0.25, reference=jnp.array([0.0, 2.0])
    )
    np.testing.assert_allclose(at_reference[1], 1)
    with pytest.raises(ValueError, match="ridge above 0"):
        pessimistic_rewards(jnp.ones(3), features, covariance, bound=0.5, ridge=0.0)


def test_pessimistic_beats_greedy_on_a_coverage_gap_bandit():
    """Ten arms. 400 comparisons say that arm 0 beats arm 1; each of the others met arm 1 once and is as bad.

    Of eight such arms some win by luck, and maximum likelihood believes them.
    """
    arms = jnp.eye(10)
    theta = jnp.zeros(10).at[0].set(1.0)
    pairs = np.array([(0, 1)] * 400 + [(arm, 1) for arm in range(2, 10)])
    differences = arms[pairs[:, 0]] - arms[pairs[:, 1]]

    def regrets(key):
        won = jax.random.uniform(key, (len(pairs),)) < jax.nn.sigmoid(differences @ theta)
        signed = jnp.where(won[:, None], differences, -differences)

        def objective(t):
            zeros = jnp.zeros(len(pairs))
            return jnp.sum(bradley_terry(signed @ t, zeros)) + 0.01 * jnp.sum(t**2)

        def newton(t, _):
            return t - jnp.linalg.solve(jax.hessian(objective)(t), jax.grad(objective)(t)), None

        fitted, _ = jax.lax.scan(newton, jnp.zeros(10), length=15)
        covariance = add_comparisons(empty_covariance(10), signed, jnp.ones(len(pairs), bool))
        rewards = arms @ fitted
        careful = pessimistic_rewards(rewards, arms, covariance, bound=0.5, ridge=0.01, reference=arms[1])
        return theta[0] - theta[jnp.argmax(rewards)], theta[0] - theta[jnp.argmax(careful)]

    greedy, pessimistic = jax.jit(jax.vmap(regrets))(jax.random.split(jax.random.key(1), 100))
    # Greedy errs unless none of eight fair coins falls right (1/256); pessimism must not err at all.
    assert jnp.mean(greedy) > 0.9 and jnp.max(pessimistic) == 0


def test_reward_bias_makes_the_reference_mean_zero():
    rewards = jnp.asarray(RNG.normal(3.0, 5.0, 1000), jnp.float32).at[0].set(jnp.nan)
    mask = ~jnp.isnan(rewards)
    calibrated = np.asarray(rewards + reward_bias(rewards, mask), np.float64)
    assert abs(np.nanmean(calibrated)) < 1e-5
    assert reward_bias(rewards, jnp.zeros_like(mask)) == 0
