"""int8 for rollouts: weights with one scale per output channel, cache rows with one scale per head."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

LEVELS = 127


class Quantized(NamedTuple):
    """``values`` times ``scale``, which lacks the axes that share one."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]


def quantize(x: Float[Array, "..."], axes: tuple[int, ...]) -> Quantized:
    """To the nearest of 255 levels around zero, the largest number along ``axes`` on the last: off by scale / 2."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=axes, keepdims=True) / LEVELS
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Quantized(values, jnp.squeeze(scale, axes))


def dequantize(x: Any, axes: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """A plain array, which is what it may have been."""
    if not isinstance(x, Quantized):
        return x.astype(dtype)
    return (x.values * jnp.expand_dims(x.scale, axes)).astype(dtype)


def as_stored(like: Any, x: Float[Array, "... h"]) -> Any:
    """``x`` as a cache such as ``like`` holds it: a scale for each of its rows where that is quantised."""
    return quantize(x, (-1,)) if isinstance(like, Quantized) else x.astype(like.dtype)


def stored_values(x: Any) -> Array:
    return x.values if isinstance(x, Quantized) else x


def times_row_scales(scores: Float[Array, "... x"], stored: Any) -> Float[Array, "... x"]:
    """``scores`` over the rows of a cache, times their scales; axes that it lacks stand before its rows."""
    if not isinstance(stored, Quantized):
        return scores
    scale = stored.scale
    return scores * scale.reshape(*scale.shape[:-1], *(1,) * (scores.ndim - scale.ndim), scale.shape[-1])


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def cast(tree: Any, dtype: DTypeLike) -> Any:
    """Plain leaves in ``dtype``; quantised ones as they are."""
    return jax.tree.map(lambda x: x if is_quantized(x) else x.astype(dtype), tree, is_leaf=is_quantized)
