"""Masked statistics and aggregations against numbers worked by hand and against NumPy on the kept entries alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.losses import (
    AGGREGATIONS,
    SEQUENCE_MEAN_TOKEN_MEAN,
    SEQUENCE_MEAN_TOKEN_SUM,
    TOKEN_MEAN,
    aggregate,
    constant_length,
    count_all_sequences,
    masked_mean,
    masked_sum,
    masked_var,
    whiten,
    zero_masked,
)

pytestmark = pytest.mark.fast

X = np.array([[1.0, 2.0, 4.0], [6.0, np.nan, np.inf], [np.nan, np.nan, np.nan]])
MASK = np.array([[True, True, True], [True, False, False], [False, False, False]])
EMPTY = np.zeros_like(MASK)


def test_statistics_by_hand():
    x = jnp.asarray(X)
    # Kept: 1, 2, 4, 6. Sum 13, mean 13/4 = 3.25.
    assert masked_sum(x, MASK) == 13.0
    assert masked_mean(x, MASK) == 3.25
    # Squared distances 5.0625 + 1.5625 + .5625 + 7.5625 = 14.75; over 4 biased, over 3 unbiased.
    np.testing.assert_allclose(masked_var(x, MASK, ddof=0), 14.75 / 4, rtol=1e-6)
    np.testing.assert_allclose(masked_var(x, MASK, ddof=1), 14.75 / 3, rtol=1e-6)
    np.testing.assert_allclose(masked_mean(x, MASK, axis=1), [7 / 3, 6, 0], rtol=1e-6)
    # Row 0: mean 7/3, squares (16 + 1 + 25)/9 = 42/9, over 2. One entry and no entry: 0.
    np.testing.assert_allclose(masked_var(x, MASK, axis=1, ddof=1), [42 / 18, 0, 0], rtol=1e-6)


def test_empty_mask_gives_zero():
    x = jnp.asarray(X)
    for value in (masked_sum(x, EMPTY), masked_mean(x, EMPTY), masked_var(x, EMPTY, ddof=1)):
        assert value == 0.0
    np.testing.assert_array_equal(whiten(x, EMPTY), 0.0)
    for aggregation in (TOKEN_MEAN, SEQUENCE_MEAN_TOKEN_MEAN, SEQUENCE_MEAN_TOKEN_SUM, constant_length(3)):
        assert aggregate(aggregation, x, EMPTY) == 0.0


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_matches_numpy_on_the_kept_entries(shift_mean):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, mask = rng.normal(3.0, 2.0, (5, 7)), rng.random((5, 7)) < 0.6
        whitened = np.asarray(whiten(jnp.asarray(np.where(mask, x, np.nan)), mask, shift_mean=shift_mean))
        kept = x[mask]
        expected = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8) + (0 if shift_mean else kept.mean())
        assert whitened.dtype == np.float64
        np.testing.assert_allclose(whitened[mask], expected, rtol=1e-12)
        np.testing.assert_array_equal(whitened[~mask], 0.0)


def test_aggregations_by_hand():
    x = jnp.asarray(X)
    assert aggregate(TOKEN_MEAN, x, MASK) == 13 / 4
    # Rows: mean 7/3 of three tokens, 6 of one; two rows are not empty.
    np.testing.assert_allclose(aggregate(SEQUENCE_MEAN_TOKEN_MEAN, x, MASK), (7 / 3 + 6) / 2, rtol=1e-6)
    assert aggregate(SEQUENCE_MEAN_TOKEN_SUM, x, MASK) == 13 / 2
    np.testing.assert_allclose(aggregate(constant_length(10), x, MASK), 13 / (2 * 10), rtol=1e-6)
    # TRL counts the empty row as well.
    counted = SEQUENCE_MEAN_TOKEN_SUM._replace(denominator=count_all_sequences)
    np.testing.assert_allclose(aggregate(counted, x, MASK), 13 / 3, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_add_over_micro_batches(name, parts):
    aggregation = AGGREGATIONS[name](9) if name == "constant_length" else AGGREGATIONS[name]
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        x, mask = jnp.asarray(rng.normal(size=(8, 9))), jnp.asarray(rng.random((8, 9)) < 0.4)
        pieces = list(zip(jnp.split(x, parts), jnp.split(mask, parts), strict=True))
        total = sum(aggregation.numerator(*piece) for piece in pieces)
        count = sum(aggregation.denominator(piece[1]) for piece in pieces)
        np.testing.assert_allclose(total / count, aggregate(aggregation, x, mask), rtol=1e-13)


def test_masked_nan_stays_out_of_gradients():
    x = jnp.asarray(X)
    functions = [
        lambda x: masked_sum(x, MASK),
        lambda x: masked_mean(x, MASK),
        lambda x: masked_var(x, MASK, ddof=1),
        lambda x: jnp.sum(jnp.square(whiten(x, MASK))[0]),
        lambda x: aggregate(SEQUENCE_MEAN_TOKEN_MEAN, x, MASK),
        lambda x: aggregate(TOKEN_MEAN, jnp.exp(zero_masked(MASK, x)), MASK),
    ]
    for function in functions:
        gradient = np.asarray(jax.grad(function)(x))
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[~MASK], 0.0)
        assert np.abs(gradient[MASK]).max() > 0


def test_low_precision_is_summed_in_float32():
    ones = jnp.ones((1, 4096), jnp.bfloat16)  # a bfloat16 sum would stop at 256
    assert masked_sum(ones, ones > 0) == 4096.0
    assert masked_sum(ones, ones > 0).dtype == jnp.float32


def test_an_array_of_another_shape_is_refused_even_where_it_would_broadcast():
    for function in (masked_sum, masked_mean, lambda x, mask: whiten(x, mask), lambda x, mask: zero_masked(mask, x)):
        with pytest.raises(ValueError, match=r"is \[3(, 3)?\] and \w+(\[0\])? \[3(, 3)?\]; both must be of one shape"):
            function(jnp.ones(3), MASK)


def test_constant_length_refuses_an_empty_budget():
    with pytest.raises(ValueError, match="max_tokens=0"):
        constant_length(0)
