"""Policy losses: hand numbers, clip edges, NumPy oracles, selections, masked NaN, one-call forms, micro-batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rljax.losses import (
    SEQUENCE_MEAN_TOKEN_MEAN,
    TOKEN_MEAN,
    aggregate,
    cispo,
    clip_cov,
    clipped_surrogate,
    constant_length,
    dual_clip,
    entropy_bonus,
    gmpo,
    grpo_loss,
    gspo,
    gspo_token,
    highest_covariance,
    is_clipped_high,
    is_clipped_low,
    k3,
    kl_cov,
    logprob_covariance,
    ppo_loss,
    random_high_covariance,
    reinforce,
    sapo,
    surrogate,
    zero_masked,
)

pytestmark = pytest.mark.fast

LOW, HIGH = 0.2, 0.28


def batch(seed=0, b=4, t=6, spread=0.3):
    """Log-probs near the behaviour policy's, advantages of both signs, a mask with an empty row, NaN where masked."""
    rng = np.random.default_rng(seed)
    mask = rng.random((b, t)) < 0.7
    mask[-1] = False
    behavior = -rng.random((b, t)) - 0.5
    logprobs = behavior + spread * rng.normal(size=(b, t))
    advantages = np.broadcast_to(rng.normal(size=(b, 1)), (b, t))
    return tuple(np.where(mask, x, np.nan) for x in (logprobs, behavior, advantages)), mask


def one(function, ratio, advantage, *args, **kwargs):
    """Value and d/d logprob of a token with this ratio; the behaviour log-prob is -1."""

    @jax.jit
    @jax.value_and_grad
    def value(logprob):
        return function(logprob[None, None], jnp.array([[-1.0]]), jnp.array([[advantage]]), *args, **kwargs).sum()

    return np.array(value(np.float32(np.log(ratio) - 1.0)))


def test_clipped_surrogate_by_hand():
    loss = partial(one, clipped_surrogate)
    # Inside: -A ρ, and as much gradient (dρ/dl = ρ).
    np.testing.assert_allclose(loss(1.1, 2.0, LOW, HIGH), [-2.2, -2.2], rtol=1e-5)
    # A > 0 above 1.28: -A · 1.28, no gradient. A > 0 below .8: the minimum is the unclipped one.
    np.testing.assert_allclose(loss(1.5, 2.0, LOW, HIGH), [-2.56, 0.0], rtol=1e-5)
    np.testing.assert_allclose(loss(0.5, 2.0, LOW, HIGH), [-1.0, -1.0], rtol=1e-5)
    # A < 0 the other way round.
    np.testing.assert_allclose(loss(0.5, -2.0, LOW, HIGH), [1.6, 0.0], rtol=1e-5)
    np.testing.assert_allclose(loss(1.5, -2.0, LOW, HIGH), [3.0, 3.0], rtol=1e-5)
    # On policy the gradient is REINFORCE's.
    np.testing.assert_allclose(loss(1.0, 2.0, LOW, HIGH), [-2.0, -2.0], rtol=1e-6)
    np.testing.assert_allclose(one(surrogate, 1.5, 2.0), [-3.0, -3.0], rtol=1e-5)


@pytest.mark.parametrize(("advantage", "edge", "outward"), [(1.5, 1 + HIGH, 1e-3), (-1.5, 1 - LOW, -1e-3)])
def test_gradient_stops_just_past_the_edge_that_binds(advantage, edge, outward):
    for function in (clipped_surrogate, partial(single_row, gspo), partial(single_row, gspo_token)):
        assert one(function, edge + outward, advantage, LOW, HIGH)[1] == 0.0
        assert one(function, edge - outward, advantage, LOW, HIGH)[1] != 0.0
        # The other edge does not bind for this sign.
        other = 1 - LOW + outward if advantage > 0 else 1 + HIGH + outward
        assert one(function, other - 3 * outward, advantage, LOW, HIGH)[1] != 0.0
        assert one(function, other + 3 * outward, -advantage, LOW, HIGH)[1] != 0.0


def single_row(function, logprobs, proximal, advantages, eps_low, eps_high):
    return function(logprobs, proximal, advantages, jnp.ones(logprobs.shape, bool), eps_low, eps_high)


def test_clip_fractions_mark_where_the_gradient_stops():
    ratios = jnp.array([[0.5, 0.5, 1.0, 1.5, 1.5]])
    advantages = jnp.array([[1.0, -1.0, 1.0, 1.0, -1.0]])
    arguments = (jnp.log(ratios), jnp.zeros((1, 5)), advantages)
    low, high = is_clipped_low(*arguments, LOW), is_clipped_high(*arguments, HIGH)
    np.testing.assert_array_equal(low, [[False, True, False, False, False]])
    np.testing.assert_array_equal(high, [[False, False, False, True, False]])
    gradient = jax.grad(lambda x: clipped_surrogate(x, *arguments[1:], LOW, HIGH).sum())(arguments[0])
    np.testing.assert_array_equal(gradient == 0, low | high)


def test_dual_clip_by_hand():
    # A = -2, ρ = 5: 10, bounded by 3 · 2 = 6; ρ = 2 stays 4. A = 2, ρ = 1: -2 is left alone, not -6.
    losses = jnp.array([10.0, 4.0, -2.0])
    np.testing.assert_array_equal(dual_clip(losses, jnp.array([-2.0, -2.0, 2.0]), 3.0), [6.0, 4.0, -2.0])
    with pytest.raises(ValueError, match=r"ceiling=1\.0"):
        dual_clip(losses, losses, 1.0)


def test_reinforce_and_entropy_bonus():
    np.testing.assert_array_equal(reinforce(jnp.array([-0.5]), jnp.array([3.0])), [1.5])
    assert jax.grad(lambda l: reinforce(l, 3.0))(-0.5) == -3.0
    np.testing.assert_array_equal(entropy_bonus(jnp.array([0.7])), jnp.array([-0.7]))


def test_gspo_by_hand():
    # log ρ = (.1, .3), mean .2: s = e^.2 = 1.2214 > 1.1: clipped for A > 0, free for A < 0.
    logprobs, proximal = jnp.array([[-0.9, -0.7, jnp.nan]]), jnp.array([[-1.0, -1.0, 5.0]])
    mask = jnp.array([[True, True, False]])

    def loss(logprobs, function, advantage):
        losses = function(logprobs, proximal, jnp.full((1, 3), advantage), mask, 0.1, 0.1)
        return aggregate(SEQUENCE_MEAN_TOKEN_MEAN, losses, mask)

    s = np.exp(0.2)
    for function in (gspo, gspo_token):
        step = jax.jit(jax.value_and_grad(partial(loss, function=function)))
        value, gradient = step(logprobs, advantage=-1.0)
        np.testing.assert_allclose(value, s, rtol=1e-6)
        np.testing.assert_allclose(gradient, [[s / 2, s / 2, 0.0]], rtol=1e-6)  # ds/dl_t = s / |o|
        value, gradient = step(logprobs, advantage=1.0)
        np.testing.assert_allclose(value, -1.1, rtol=1e-6)
        np.testing.assert_array_equal(gradient, 0.0)


def test_cispo_by_hand():
    # ρ = 1.5 weighs 1.28 and still has a gradient; an open lower side leaves ρ = .1 as it is.
    value, gradient = one(cispo, 1.5, 2.0, 1.0, HIGH)
    np.testing.assert_allclose([value, gradient], [-1.28 * 2 * (np.log(1.5) - 1), -2.56], rtol=1e-5)
    np.testing.assert_allclose(one(cispo, 0.1, 2.0, 1.0, HIGH)[1], -0.2, rtol=1e-5)
    np.testing.assert_allclose(one(cispo, 0.1, 2.0, LOW, HIGH)[1], -1.6, rtol=1e-5)


def test_gmpo_by_hand():
    # log ρ = (.6, -.6, 0). A > 0 clips above: (.4, -.6, 0), mean -.2/3. A < 0 clips below: (.6, -.4, 0), mean .2/3.
    logprobs, proximal = jnp.array([[0.6, -0.6, 0.0, jnp.nan]]), jnp.zeros((1, 4))
    mask = jnp.array([[True, True, True, False]])

    def loss(logprobs, advantage):
        losses = gmpo(logprobs, proximal, jnp.full((1, 4), advantage), mask, 0.4, 0.4)
        return aggregate(SEQUENCE_MEAN_TOKEN_MEAN, losses, mask)

    step = jax.jit(jax.value_and_grad(loss))
    value, gradient = step(logprobs, 1.0)
    np.testing.assert_allclose(value, -np.exp(-0.2 / 3), rtol=1e-6)
    np.testing.assert_allclose(gradient, -np.exp(-0.2 / 3) / 3 * np.array([[0, 1, 1, 0]]), rtol=1e-5)
    value, gradient = step(logprobs, -1.0)
    np.testing.assert_allclose(value, np.exp(0.2 / 3), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.exp(0.2 / 3) / 3 * np.array([[1, 0, 1, 0]]), rtol=1e-5)


def test_sapo_by_hand():
    # ρ = 1: σ(0) = 1/2, so the value is -A · 2/τ and the gradient -A · (4/τ) · τ/4 = -A.
    np.testing.assert_allclose(one(sapo, 1.0, 3.0), [-6.0, -3.0], rtol=1e-6)
    np.testing.assert_allclose(one(sapo, 1.0, -3.0), [6.0 / 1.05, 3.0], rtol=1e-6)
    # ρ = 2, τ = 1: σ(1) = .731059; gradient -A · 4 σ (1 - σ) · ρ = -3 · 4 · .196612 · 2.
    np.testing.assert_allclose(one(sapo, 2.0, 3.0), [-3 * 4 * 0.7310586, -3 * 8 * 0.1966119], rtol=1e-5)


def test_covariance_matches_numpy():
    (logprobs, _, advantages), mask = batch()
    covariance = logprob_covariance(jnp.asarray(advantages), jnp.asarray(logprobs), mask)
    a, l = advantages[mask], logprobs[mask]
    np.testing.assert_allclose(np.asarray(covariance)[mask], (a - a.mean()) * (l - l.mean()), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(covariance)[~mask], 0.0)


def test_highest_covariance_takes_the_top_of_the_kept():
    covariance = jnp.array([[3.0, 9.0, 1.0], [5.0, -1.0, 4.0]])
    mask = jnp.array([[True, False, True], [True, True, True]])
    np.testing.assert_array_equal(
        highest_covariance(covariance, mask, count=2), [[False, False, False], [True, False, True]]
    )
    np.testing.assert_array_equal(highest_covariance(covariance, mask, count=99), mask)


def test_random_high_covariance_takes_a_few_inside_the_band():
    covariance = jnp.linspace(0, 8, 800).reshape(8, 100)
    eligible = jnp.arange(800).reshape(8, 100) % 2 == 0
    chosen = [
        random_high_covariance(jax.random.key(seed), covariance, eligible, count=5, low=1.0, high=5.0)
        for seed in (0, 0, 1)
    ]
    assert (chosen[0] == chosen[1]).all() and (chosen[0] != chosen[2]).any()
    for mask in chosen:
        assert mask.sum() == 5
        assert (eligible & (covariance > 1) & (covariance < 5))[mask].all()
    few = random_high_covariance(jax.random.key(0), covariance, covariance == 8, count=5, low=1.0, high=9.0)
    assert few.sum() == 1


def test_clip_cov_and_kl_cov_by_hand():
    logprobs, proximal, selected = jnp.array([[0.5, -0.5]]), jnp.zeros((1, 2)), jnp.array([[True, False]])

    def losses(function, logprobs):
        return function(surrogate(logprobs, proximal, jnp.ones((1, 2))))

    np.testing.assert_allclose(losses(partial(clip_cov, selected=selected), logprobs), -jnp.exp(logprobs))
    gradient = jax.grad(lambda l: losses(partial(clip_cov, selected=selected), l).sum())(logprobs)
    np.testing.assert_allclose(gradient, [[0.0, -np.exp(-0.5)]], rtol=1e-6)
    penalised = partial(kl_cov, logprobs=logprobs, proximal_logprobs=proximal, selected=selected, coef=2.0)
    np.testing.assert_allclose(losses(penalised, logprobs), [[-np.exp(0.5) + 1.0, -np.exp(-0.5)]], rtol=1e-6)


def numpy_grpo(logprobs, behavior, advantages, mask, ref, kl_coef):
    """One completion and one token at a time."""
    total, rows = 0.0, 0
    for i in range(len(mask)):
        tokens = []
        for t in np.flatnonzero(mask[i]):
            ratio, a = np.exp(logprobs[i, t] - behavior[i, t]), advantages[i, t]
            d = logprobs[i, t] - ref[i, t]
            tokens.append(-min(ratio * a, np.clip(ratio, 1 - LOW, 1 + HIGH) * a) + kl_coef * (np.exp(-d) - 1 + d))
        if tokens:
            total, rows = total + np.mean(tokens), rows + 1
    return total / rows


def test_grpo_loss_matches_numpy():
    with jax.enable_x64(True):
        (logprobs, behavior, advantages), mask = batch()
        ref = batch(seed=1)[0][0]
        ref = np.where(mask & np.isnan(ref), -1.0, ref)
        loss = grpo_loss(logprobs, behavior, advantages, mask, ref, eps_low=LOW, eps_high=HIGH, kl_coef=0.1)
        assert loss.dtype == jnp.float64
        np.testing.assert_allclose(loss, numpy_grpo(logprobs, behavior, advantages, mask, ref, 0.1), rtol=1e-12)
        without = grpo_loss(logprobs, behavior, advantages, mask, eps_low=LOW, eps_high=HIGH)
        np.testing.assert_allclose(without, numpy_grpo(logprobs, behavior, advantages, mask, ref, 0.0), rtol=1e-12)


def test_ppo_loss_matches_numpy():
    with jax.enable_x64(True):
        (logprobs, behavior, advantages), mask = batch()
        rng = np.random.default_rng(5)
        values, old, returns = (np.where(mask, rng.normal(size=mask.shape), np.nan) for _ in range(3))
        loss = ppo_loss(logprobs, behavior, advantages, mask, values, old, returns, value_coef=0.5)
        m = mask
        ratio = np.exp(logprobs - behavior)[m]
        policy = -np.minimum(ratio * advantages[m], np.clip(ratio, 0.8, 1.2) * advantages[m])
        near = old + np.clip(values - old, -0.2, 0.2)
        value = np.maximum((values - returns) ** 2, (near - returns) ** 2)[m] / 2
        np.testing.assert_allclose(loss, np.mean(policy + 0.5 * value), rtol=1e-12)


def all_losses(logprobs, behavior, advantages, mask, ref):
    """Every policy loss, each through its aggregation, of inputs that may hold anything where masked."""
    clean = zero_masked(mask, logprobs, behavior, advantages)
    edges = (LOW, HIGH)
    return {
        "reinforce": aggregate(TOKEN_MEAN, reinforce(clean[0], clean[2]), mask),
        "dr_grpo": aggregate(constant_length(6), clipped_surrogate(*clean, *edges), mask),
        "dual_clip": aggregate(TOKEN_MEAN, dual_clip(clipped_surrogate(*clean, *edges), clean[2], 3.0), mask),
        "gspo": aggregate(SEQUENCE_MEAN_TOKEN_MEAN, gspo(logprobs, behavior, advantages, mask, *edges), mask),
        "gspo_token": aggregate(
            SEQUENCE_MEAN_TOKEN_MEAN, gspo_token(logprobs, behavior, advantages, mask, *edges), mask
        ),
        "gmpo": aggregate(SEQUENCE_MEAN_TOKEN_MEAN, gmpo(logprobs, behavior, advantages, mask, 0.4, 0.4), mask),
        "cispo": aggregate(TOKEN_MEAN, cispo(*clean, *edges), mask),
        "sapo": aggregate(SEQUENCE_MEAN_TOKEN_MEAN, sapo(*clean), mask),
        "k3": aggregate(TOKEN_MEAN, k3(clean[0], zero_masked(mask, ref)), mask),
        "grpo": grpo_loss(logprobs, behavior, advantages, mask, ref),
        "ppo": ppo_loss(logprobs, behavior, advantages, mask, ref, behavior, ref),
    }


LOSSES = [
    "reinforce", "dr_grpo", "dual_clip", "gspo", "gspo_token", "gmpo", "cispo", "sapo", "k3", "grpo", "ppo",
]  # fmt: skip


@pytest.fixture(scope="module")
def poisoned():
    """Values and gradients of every loss with zeros, and with NaN and inf, in the masked entries."""
    (logprobs, behavior, advantages), mask = batch()
    arrays = (logprobs, behavior, advantages, np.where(mask, -1.0, np.nan))

    def fill(values):
        return tuple(jnp.asarray(np.where(mask, x, v), jnp.float32) for x, v in zip(arrays, values, strict=True))

    def step(*arrays):
        losses = all_losses(*arrays[:3], mask, arrays[3])
        return losses, jax.jacrev(lambda *a: all_losses(*a[:3], mask, a[3]), argnums=(0, 1, 2, 3))(*arrays)

    step = jax.jit(step)
    return mask, step(*fill([0, 0, 0, 0])), step(*fill([np.nan, -np.inf, np.inf, np.nan]))


@pytest.mark.parametrize("name", LOSSES)
def test_masked_entries_touch_neither_value_nor_gradient(name, poisoned):
    mask, (clean_values, clean_gradients), (values, gradients) = poisoned
    assert np.isfinite(values[name]) and values[name] == clean_values[name]
    assert np.abs(gradients[name][0]).max() > 0
    for gradient, clean in zip(gradients[name], clean_gradients[name], strict=True):
        np.testing.assert_array_equal(gradient, clean)
        np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0.0)


def test_an_empty_mask_gives_zero():
    (logprobs, behavior, advantages), mask = batch()
    empty = np.zeros_like(mask)
    losses, gradients = jax.jit(
        lambda l: (
            all_losses(l, behavior, advantages, empty, behavior),
            jax.jacrev(all_losses)(l, behavior, advantages, empty, behavior),
        )
    )(jnp.asarray(logprobs))
    for name in LOSSES:
        assert losses[name] == 0.0
        np.testing.assert_array_equal(gradients[name], 0.0)


def test_rows_in_micro_batches_and_on_devices_give_one_gradient():
    with jax.enable_x64(True):
        (logprobs, behavior, advantages), mask = batch(b=16)
        arrays = tuple(jnp.nan_to_num(x) for x in (logprobs, behavior, advantages))

        def numerator(logprobs, behavior, advantages, mask):
            losses = clipped_surrogate(logprobs, behavior, advantages, LOW, HIGH)
            return SEQUENCE_MEAN_TOKEN_MEAN.numerator(losses, mask)

        count = SEQUENCE_MEAN_TOKEN_MEAN.denominator(jnp.asarray(mask))
        gradient = jax.jit(jax.grad(numerator))
        whole = gradient(*arrays, mask) / count
        for parts in (2, 4):
            pieces = zip(*(jnp.split(x, parts) for x in (*arrays, jnp.asarray(mask))), strict=True)
            assembled = jnp.concatenate([gradient(*piece) / count for piece in pieces])
            np.testing.assert_allclose(assembled, whole, rtol=0, atol=1e-15)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        place = partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
        np.testing.assert_allclose(gradient(*map(place, (*arrays, mask))) / count, whole, rtol=0, atol=1e-15)
