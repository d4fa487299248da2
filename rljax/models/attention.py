"""Attention, and the two ways to call it: over whole rows, and for a decode step against a cache."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.models.layers import contract, wide_dtype
from rljax.models.quantized import as_stored, dequantize
from rljax.sharding import Layout

# attend(q, k, v, cache, layer) -> (output, cache): what a block calls; who calls the skeleton decides what it does.
# ``layer`` is None where layers stand apart.
Attend = Callable[[Array, Array, Array, Any, Any], tuple[Array, Any]]

QUERY_CHUNK = 1024  # longer rows are attended in chunks of queries, so that scores never take T x T
# On CPUs, whose products of small matrices are slow, shorter rows are attended in so many blocks of queries, each over
# the keys up to its own end.
BLOCKS, SHORTEST_BLOCK = 4, 64


class Cache(NamedTuple):
    """Keys and values of every layer, in the loop's carry and written in place. [L, B, K, T, H] decodes fastest.

    Arrays, or ``Quantized`` ones with a scale for each row of each head.
    """

    k: Any
    v: Any


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b k s h"],
    v: Float[Array, "b k s h"],
    visible: Bool[Array, "b t s"],
    scale: float,
) -> Float[Array, "b t n h"]:
    """Softmax attention with grouped kv heads; scores and softmax in float32. A query that sees nothing gets a mean."""
    b, t, n, h = q.shape
    kv, s = k.shape[1:3]
    # One free axis on either side of a product: XLA on CPUs has no bfloat16 product with two (jaxlib 0.10).
    grouped = q.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, h)
    wide = wide_dtype(q.dtype)
    scores = (contract("bkmh,bksh->bkms", grouped, k, wide) * scale).reshape(b, kv, n // kv, t, s)
    # Finite, so that rows of padding stay finite and their zero cotangents do not become NaN.
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(wide).min / 2)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(b, kv, -1, s)
    out = contract("bkms,bksh->bkmh", weights, v, q.dtype).reshape(b, kv, n // kv, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def visibility(
    query_positions: Int[Array, "b t"],
    key_positions: Int[Array, "b s"],
    query_segments: Int[Array, "b t"],
    key_segments: Int[Array, "b s"],
    window: int | None,
) -> Bool[Array, "b t s"]:
    """Causal, inside one segment (0 is padding), and at most ``window`` positions back."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] > 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def replicate_kv(x: Float[Array, "b t k h"], layout: Layout) -> Float[Array, "b t k2 h"]:
    """Where tensor exceeds the kv heads each is repeated in its group, so that every shard holds the one it needs."""
    repeats = max(1, layout.tensor // x.shape[2])
    return layout.constrain(jnp.repeat(x, repeats, axis=2), "batch", None, "kv_heads", None)


def full_attend(
    positions: Int[Array, "b t"],
    segments: Int[Array, "b t"],
    window: int | None,
    layout: Layout,
    scale: float,
    chunk: int = QUERY_CHUNK,
) -> Attend:
    """Whole rows at once, as training and scoring need them: no cache.

    Positions ascend within a segment, so no query sees a key to its right: four blocks are 5/8 of the whole square.
    """

    def attend(q: Array, k: Array, v: Array, cache: Any, layer: Array) -> tuple[Array, Any]:
        k, v = (replicate_kv(x, layout).swapaxes(1, 2) for x in (k, v))
        length = q.shape[1]

        def rows(q: Array, query_positions: Array, query_segments: Array, keys: int = length) -> Array:
            seen = visibility(query_positions, positions[:, :keys], query_segments, segments[:, :keys], window)
            return attention(q, k[:, :, :keys], v[:, :, :keys], seen, scale)

        if length <= chunk:
            block = math.ceil(length / BLOCKS / SHORTEST_BLOCK) * SHORTEST_BLOCK if layout.on_cpu else length
            blocks = [(start, min(start + block, length)) for start in range(0, length, block)]
            parts = [rows(q[:, a:b], positions[:, a:b], segments[:, a:b], b) for a, b in blocks]
            return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0], cache
        # Padding queries belong to segment 0: they see nothing, stay finite and are cut off again.
        split = tuple(_split_columns(x, chunk) for x in (q, positions, segments))
        out = jax.lax.map(lambda part: jax.checkpoint(rows)(*part), split).swapaxes(0, 1)
        return out.reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]], cache

    return attend


def _split_columns(x: Array, chunk: int) -> Array:
    """[B, T, ...] to [T / chunk, B, chunk, ...], T rounded up with zeros."""
    spare = -x.shape[1] % chunk
    padded = jnp.pad(x, [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2))
    return padded.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def read_layer(cache: Cache, layer: Int[Array, ""] | None) -> Cache:
    """A layer of the cache; all of it where ``layer`` is None: layers stand apart (``decoder.by_layer``)."""
    if layer is None:
        return cache
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), cache)


def write_layer(
    cache: Cache, k: Array, v: Array, layer: Int[Array, ""] | None, at: Sequence[Any], there: Array | None = None
) -> Cache:
    """A layer's keys and values from ``at`` on, where ``there`` is not false."""
    start = tuple(jnp.int32(i) for i in (at if layer is None else (layer, *at)))  # one type, in float64 runs too

    def put(old: Array, new: Array) -> Array:
        new, place = (new if layer is None else new[None]).astype(old.dtype), start[: old.ndim]
        if there is not None:
            new = jnp.where(there, new, jax.lax.dynamic_slice(old, place, new.shape))
        return jax.lax.dynamic_update_slice(old, new, place)

    return jax.tree.map(put, cache, Cache(as_stored(cache.k, k), as_stored(cache.v, v)))


def rows_together(cache: Cache, layout: Layout, heads_axis: int) -> Cache:
    """A stack of layers whose every head has its rows side by side in memory, as attention reads them.

    The TPU compiler would lay it out for the write of one column, and copy a layer at every token to read it.
    """

    def lay(x: Array) -> Array:
        axes = [None] * x.ndim
        return layout.in_memory(x, [*axes[:heads_axis], "kv_heads", *axes[heads_axis + 1 :]], range(x.ndim))

    return jax.tree.map(lay, cache)


def cached_attend(start: Int[Array, ""] | int, visible: Bool[Array, "b t s"], layout: Layout, scale: float) -> Attend:
    """Write this call's keys and values at column ``start`` of every row, then attend over the cache."""

    def attend(q: Array, k: Array, v: Array, cache: Cache, layer: Array) -> tuple[Array, Cache]:
        k, v = (replicate_kv(x, layout).swapaxes(1, 2) for x in (k, v))
        cache = write_layer(cache, k, v, layer, (0, 0, start, 0))
        length = visible.shape[-1]
        mine = jax.tree.map(lambda x: x[:, :, :length], read_layer(cache, layer))
        keys, values = (dequantize(x, (-1,), q.dtype) for x in mine)
        return attention(q, keys, values, visible, scale), cache

    return attend
