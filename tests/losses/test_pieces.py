"""The smallest pieces, which other tests only see through larger ones, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.losses import (
    batch_mean,
    batch_std,
    count_sequences,
    count_tokens,
    group_max,
    group_sum,
    log_ratio,
)

pytestmark = pytest.mark.fast


def test_counts_by_hand():
    mask = jnp.array([[True, True], [False, True], [False, False]])
    assert (count_tokens(mask), count_sequences(mask)) == (3, 2)


def test_group_sum_and_group_max_by_hand():
    # Groups 7, 3, 7, 3 of rows 1, -2, 4, -8, in any order of rows and with any ids.
    x, group_id = jnp.array([1.0, -2.0, 4.0, -8.0]), jnp.array([7, 3, 7, 3])
    np.testing.assert_array_equal(group_sum(x, group_id), [5, -10, 5, -10])
    np.testing.assert_array_equal(group_max(x, group_id), [4, -2, 4, -2])


def test_batch_mean_and_batch_std_by_hand():
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14 over 2.
    rewards, mask = jnp.array([1.0, jnp.nan, 2.0, 6.0]), jnp.array([True, False, True, True])
    assert batch_mean(rewards, mask) == 3
    np.testing.assert_allclose(batch_std(rewards, mask), np.sqrt(7), rtol=1e-6)


def test_log_ratio_by_hand():
    values, grad = jax.vmap(jax.value_and_grad(log_ratio), in_axes=(0, None))(jnp.array([-1.0, -90.0, 60.0]), -3.0)
    np.testing.assert_array_equal(values, [2, -40, 40])
    np.testing.assert_array_equal(grad, [1, 0, 0])
