"""Masked sums, means, variances and whitening, and the aggregations that turn a token loss into a scalar.

A masked entry may hold anything, NaN included: it reaches neither the value nor the gradient of a function that takes
``mask``. Functions of single tokens take no mask; pass their inputs through ``zero_masked`` first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from rljax.losses.shapes import check_shapes


def at_least_float32(x: Shaped[Array, "*s"]) -> Float[Array, "*s"]:
    """``x`` in float32, or unchanged where it is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@check_shapes
def zero_masked(mask: Bool[Array, "*#s"], *arrays: Float[Array, "*s"]) -> Any:
    """Each array with 0 where the mask is False, in float32 or wider: the inner half of a double ``where``.

    A NaN that enters ``exp`` comes back in the gradient even if the result is masked later (0 · NaN), so it is taken
    out before. One array in, one array out; several in, a tuple out.
    """
    zeroed = tuple(jnp.where(mask, at_least_float32(x), 0) for x in arrays)
    return zeroed[0] if len(zeroed) == 1 else zeroed


@check_shapes
def masked_sum(x: Float[Array, "*s"], mask: Bool[Array, "*s"], axis: int | None = None) -> Float[Array, "*r"]:
    """Sum of the kept entries; an empty mask gives 0."""
    return jnp.sum(zero_masked(mask, x), axis=axis)


@check_shapes
def masked_mean(x: Float[Array, "*s"], mask: Bool[Array, "*s"], axis: int | None = None) -> Float[Array, "*r"]:
    """Mean of the kept entries; an empty mask gives 0."""
    return masked_sum(x, mask, axis) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


@check_shapes
def masked_var(
    x: Float[Array, "*s"], mask: Bool[Array, "*s"], axis: int | None = None, *, ddof: int
) -> Float[Array, "*r"]:
    """Variance of the kept entries over ``n - ddof``: 0 is biased (``jnp.var``), 1 unbiased (``torch.var``).

    ``n - ddof`` is at least 1, so one entry or an empty mask gives 0.
    """
    x = zero_masked(mask, x)
    count = jnp.sum(mask, axis=axis, keepdims=True)
    mean = jnp.sum(x, axis=axis, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(mask, jnp.square(x - mean), 0), axis=axis)
    return squares / jnp.maximum(jnp.sum(mask, axis=axis) - ddof, 1)


@check_shapes
def whiten(
    x: Float[Array, "*s"], mask: Bool[Array, "*s"], *, shift_mean: bool = True, eps: float = 1e-8
) -> Float[Array, "*s"]:
    """``(x - mean) / sqrt(var + eps)`` over all kept entries, the variance unbiased (2403.17031, details 24 and 25).

    Without ``shift_mean`` the mean is added back. Masked entries and an empty mask give 0.
    """
    x = zero_masked(mask, x)
    mean = masked_mean(x, mask)
    whitened = (x - mean) / jnp.sqrt(masked_var(x, mask, ddof=1) + eps)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0)


@check_shapes
def count_tokens(mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    """How many tokens are kept."""
    return jnp.sum(mask).astype(jnp.float32)


@check_shapes
def count_sequences(mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    """How many rows keep at least one token."""
    return jnp.sum(jnp.any(mask, axis=-1)).astype(jnp.float32)


@check_shapes
def count_all_sequences(mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    """How many rows there are, empty ones included (TRL counts so)."""
    return jnp.asarray(mask.shape[0], jnp.float32)


def sum_of_sequence_means(x: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    """Sum over rows of the mean over each row's kept tokens; an empty row adds 0."""
    return jnp.sum(masked_mean(x, mask, axis=-1))


class Aggregation(NamedTuple):
    """A token loss to a scalar in two parts, each of which adds over micro-batches and devices before the division."""

    numerator: Callable[[Float[Array, "b t"], Bool[Array, "b t"]], Float[Array, ""]]
    denominator: Callable[[Bool[Array, "b t"]], Float[Array, ""]]


def constant_length(max_tokens: int) -> Aggregation:
    """Sum over all tokens over (non-empty rows × ``max_tokens``): Dr. GRPO (2503.20783), free of length bias."""
    if max_tokens < 1:
        raise ValueError(f"constant_length got max_tokens={max_tokens}; give the generation budget, at least 1")
    return Aggregation(masked_sum, lambda mask: count_sequences(mask) * max_tokens)


# A sequence counts if it keeps a token; ``_replace(denominator=count_all_sequences)`` counts the empty ones too.
TOKEN_MEAN = Aggregation(masked_sum, count_tokens)  # DAPO, 2503.14476, eq. 8
SEQUENCE_MEAN_TOKEN_MEAN = Aggregation(sum_of_sequence_means, count_sequences)  # GRPO, 2402.03300, eq. 3
SEQUENCE_MEAN_TOKEN_SUM = Aggregation(masked_sum, count_sequences)

# "constant_length" is a factory: it needs the budget.
AGGREGATIONS: dict[str, Aggregation | Callable[[int], Aggregation]] = {
    "token_mean": TOKEN_MEAN,
    "sequence_mean_token_mean": SEQUENCE_MEAN_TOKEN_MEAN,
    "sequence_mean_token_sum": SEQUENCE_MEAN_TOKEN_SUM,
    "constant_length": constant_length,
}


@check_shapes
def aggregate(aggregation: Aggregation, x: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    """Numerator over denominator of one batch; an empty mask gives 0."""
    return aggregation.numerator(x, mask) / jnp.maximum(aggregation.denominator(mask), 1)
