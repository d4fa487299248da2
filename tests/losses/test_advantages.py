"""Advantages of whole completions: hand numbers, sixteen normalisers against NumPy, states, row masks."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.losses import (
    broadcast_to_tokens,
    empty_moments,
    empty_percentile_scale,
    gpg_advantages,
    group_ids,
    group_mean,
    group_std,
    leave_one_out,
    mask_truncated,
    merge_moments,
    mixed_groups,
    moments_of,
    normalize_rewards,
    opo_baseline,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    running_std,
    scale_by_percentile,
    soft_overlong_penalty,
    update_percentile_scale,
)
from rljax.losses.advantages import MEANS

pytestmark = pytest.mark.fast

IDS = np.array([7, 7, 7, 3, 3, 3])
REWARDS = np.array([1.0, 2.0, 6.0, 0.1, 0.1, 0.1])
ALL = np.ones(6, bool)


def numpy_normalized(rewards, ids, mask, mean, std, seen):
    """The definition, row by row, in float64."""
    advantages = np.zeros_like(rewards)
    for i, reward in enumerate(rewards):
        group = rewards[ids == ids[i]]
        centre = {"group": group.mean(), "batch": rewards[mask].mean(), "running": seen.mean(), "none": 0.0}[mean]
        scale = {"group": group, "batch": rewards[mask], "running": seen}.get(std)
        advantages[i] = (reward - centre) / (1.0 if scale is None else scale.std(ddof=1) + 1e-6)
    return advantages


@pytest.mark.parametrize(("mean", "std"), list(itertools.product(MEANS, MEANS)))
def test_sixteen_normalisers_match_numpy(mean, std):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        ids = np.repeat(rng.permutation(6), 4)
        rewards = rng.normal(size=24)
        mask = np.isin(ids, [0, 2, 3, 5])  # rows of kept groups
        before = rng.normal(size=10)
        moments = merge_moments(
            moments_of(jnp.asarray(before), jnp.ones(10, bool)), moments_of(jnp.asarray(rewards), jnp.ones(24, bool))
        )
        arguments = (jnp.asarray(rewards), jnp.asarray(ids), jnp.asarray(mask))
        actual = jax.jit(partial(normalize_rewards, mean=mean, std=std))(*arguments, moments=moments)
        expected = numpy_normalized(rewards, ids, mask, mean, std, np.append(before, rewards))
        assert actual.dtype == jnp.float64
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_normalisers_by_hand():
    # Group 7: mean 3, squares 4 + 1 + 9 = 14, unbiased variance 7.
    np.testing.assert_allclose(group_mean(REWARDS, IDS), [3, 3, 3, 0.1, 0.1, 0.1], rtol=1e-7)
    np.testing.assert_allclose(group_std(REWARDS, IDS), [np.sqrt(7)] * 3 + [0] * 3, rtol=1e-6)
    advantages = normalize_rewards(REWARDS, IDS, ALL, mean="group", std="group")
    np.testing.assert_allclose(advantages[:3], np.array([-2, -1, 3]) / (np.sqrt(7) + 1e-6), rtol=1e-6)


@pytest.mark.parametrize("std", sorted(MEANS))
def test_equal_rewards_give_exactly_zero(std):
    # Groups of 7: summing a number 7 times rounds in float32, and the mean would miss it.
    rewards = np.repeat(np.random.default_rng(0).normal(size=64).astype(np.float32), 7)
    everything = np.ones(rewards.shape, bool)
    moments = moments_of(jnp.asarray(rewards), everything)
    normalize = jax.jit(partial(normalize_rewards, mean="group", std=std))
    advantages = normalize(rewards, group_ids(448, 7), everything, moments=moments)
    np.testing.assert_array_equal(advantages, 0.0)


def test_permuting_rows_permutes_advantages():
    order = np.random.default_rng(0).permutation(6)
    for mean, std in itertools.product(("group", "batch"), repeat=2):
        straight = normalize_rewards(REWARDS, IDS, ALL, mean=mean, std=std)
        permuted = normalize_rewards(REWARDS[order], IDS[order], ALL, mean=mean, std=std)
        np.testing.assert_allclose(permuted, straight[order], rtol=1e-6, atol=1e-7)


def test_batch_std_is_of_raw_rewards():
    # Two groups {0, 2} and {10, 12}: centred rewards would have variance 4/3, the raw ones (36+16+16+36)/3 = 104/3.
    rewards, ids = jnp.array([0.0, 2.0, 10.0, 12.0]), group_ids(4, 2)
    advantages = normalize_rewards(rewards, ids, jnp.ones(4, bool), mean="group", std="batch")
    np.testing.assert_allclose(advantages, np.array([-1, 1, -1, 1]) / (np.sqrt(104 / 3) + 1e-6), rtol=1e-6)


def test_statistics_come_before_filtering():
    # The truncated row (reward 0) leaves the loss, not the mean of its group: (0 + 1 + 2) / 3 = 1.
    rewards, ids = jnp.array([0.0, 1.0, 2.0]), jnp.zeros(3, int)
    mask = jnp.ones((3, 2), bool)
    kept = mask_truncated(mask, jnp.array([True, False, False]))
    centred = normalize_rewards(rewards, ids, jnp.ones(3, bool), mean="group", std="none")
    np.testing.assert_array_equal(broadcast_to_tokens(centred, kept), [[0, 0], [0, 0], [1, 1]])
    np.testing.assert_array_equal(kept, [[False, False], [True, True], [True, True]])


def test_wrong_choices_are_named():
    with pytest.raises(ValueError, match="std='sample'"):
        normalize_rewards(REWARDS, IDS, ALL, mean="group", std="sample")
    with pytest.raises(ValueError, match="needs moments"):
        normalize_rewards(REWARDS, IDS, ALL, mean="running", std="none")
    with pytest.raises(ValueError, match="group_size 4 does not divide the 6 rows"):
        group_ids(6, 4)


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 9), (0, 5), (10,)])
def test_merged_moments_equal_those_of_the_concatenation(cuts):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(5.0, 3.0, 12)
        moments = empty_moments()
        for part in np.split(x, cuts):
            moments = merge_moments(moments, moments_of(jnp.asarray(part), jnp.ones(part.shape, bool)))
        assert moments.count == 12
        np.testing.assert_allclose(moments.mean, x.mean(), rtol=1e-12)
        np.testing.assert_allclose(running_std(moments), x.std(ddof=1), rtol=1e-12)


def test_moments_skip_masked_entries():
    moments = moments_of(jnp.array([1.0, jnp.nan, 5.0]), jnp.array([True, False, True]))
    assert tuple(moments) == (2.0, 3.0, 8.0)  # (1 - 3)^2 + (5 - 3)^2
    assert tuple(moments_of(jnp.array([jnp.nan]), jnp.array([False]))) == (0.0, 0.0, 0.0)


def test_leave_one_out_subtracts_the_mean_of_the_others():
    # 1 - (2 + 6)/2 = -3, 2 - 7/2 = -1.5, 6 - 3/2 = 4.5.
    np.testing.assert_allclose(leave_one_out(REWARDS, IDS), [-3, -1.5, 4.5, 0, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(leave_one_out(jnp.array([5.0]), jnp.array([0])), [0.0])


def test_remax_and_opo_by_hand():
    np.testing.assert_array_equal(remax(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])), [0.0, -1.0])
    # Lengths 1, 2, 1: (1·1 + 2·2 + 1·6) / 4 = 11/4. A group without tokens: 0.
    baseline = opo_baseline(REWARDS, jnp.array([1, 2, 1, 0, 0, 0]), IDS)
    np.testing.assert_allclose(baseline, [2.75] * 3 + [0] * 3, rtol=1e-6)


def test_gpg_scales_by_the_share_of_mixed_groups():
    # Three of six rows are in a mixed group: α = 2.
    np.testing.assert_allclose(gpg_advantages(REWARDS, IDS), [-4, -2, 6, 0, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(gpg_advantages(jnp.ones(2), jnp.zeros(2, int)), 0.0)


def test_mixed_groups_looks_at_the_scores_it_is_given():
    correct = jnp.array([True, False, True, True, True, True])
    np.testing.assert_array_equal(mixed_groups(correct, IDS), [True] * 3 + [False] * 3)
    # All correct with different length penalties: mixed by reward, not by correctness.
    total = correct - jnp.array([0, 0, 0, 0, 0.1, 0.2])
    assert mixed_groups(total, IDS).all()


def test_reinforce_plus_plus_whitens_over_tokens():
    # γ = 1/2: rewards-to-go 2 + 1/2 · 4 = 4, 4 | 0 -> over tokens 4, 4, 0: mean 8/3, squares 96/9 = 32/3, over 2.
    rewards = jnp.array([[2.0, 4.0], [0.0, jnp.nan]])
    mask = jnp.array([[True, True], [True, False]])
    std = np.sqrt(16 / 3 + 1e-8)
    expected = np.array([[4 / 3, 4 / 3], [-8 / 3, 0]]) / std
    np.testing.assert_allclose(reinforce_plus_plus(rewards, mask, gamma=0.5), expected, rtol=1e-6)
    # Baseline form: group mean 3 of {2, 4}; tokens -1, -1, 1: mean -1/3, squares 4/9 + 4/9 + 16/9 = 24/9, over 2.
    expected = np.array([[-2 / 3, -2 / 3], [4 / 3, 0]]) / np.sqrt(4 / 3 + 1e-8)
    actual = reinforce_plus_plus_baseline(jnp.array([2.0, 4.0]), jnp.zeros(2, int), mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_percentile_scale_is_seeded_by_its_first_value():
    x = np.random.default_rng(0).normal(0, 5, (4, 50))
    mask = np.random.default_rng(1).random((4, 50)) < 0.7
    spread = np.subtract(*np.percentile(x[mask], [95, 5]))
    first = update_percentile_scale(empty_percentile_scale(), jnp.where(mask, x, jnp.nan), mask)
    np.testing.assert_allclose(first.spread, spread, rtol=1e-5)
    second = update_percentile_scale(first, 2 * x, mask, decay=0.9)
    np.testing.assert_allclose(second.spread, 0.9 * spread + 0.1 * 2 * spread, rtol=1e-5)
    np.testing.assert_allclose(scale_by_percentile(jnp.ones(3), second), 1 / (1.1 * spread), rtol=1e-5)
    unchanged = update_percentile_scale(second, x, np.zeros_like(mask))
    assert (unchanged.spread, unchanged.updates) == (second.spread, 2)
    np.testing.assert_array_equal(scale_by_percentile(jnp.ones(3), first._replace(spread=jnp.array(0.2))), 1.0)


def test_overlong_penalty_by_hand():
    # Budget 20, buffer 4: nothing up to 16, then a quarter a token.
    penalty = soft_overlong_penalty(jnp.array([3, 16, 17, 19, 20]), max_tokens=20, buffer_tokens=4, factor=2.0)
    np.testing.assert_allclose(penalty, [0, 0, -0.5, -1.5, -2.0], rtol=1e-6)
    with pytest.raises(ValueError, match="buffer_tokens is 0"):
        soft_overlong_penalty(jnp.array([1]), max_tokens=20, buffer_tokens=0)
