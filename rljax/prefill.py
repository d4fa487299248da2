"""Prompt prefill into the cache of a rollout: whole prompts, or a chunk of columns at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models.attention import Cache, attention, read_layer, replicate_kv, rows_together, visibility, write_layer
from rljax.models.decoder import Model, Params, by_layer, empty_cache, forward, row_positions
from rljax.models.quantized import as_stored, dequantize
from rljax.sharding import Layout
from rljax.types import Prompts


def entry_cache(model: Model, layout: Layout, entries: int, width: int, dtype: Any, *, shared: bool) -> Any:
    """[L, Q, K, P, H], or [L, K, Q, P, H] where prompts are shared.

    On CPUs a list of one a layer (``by_layer``).
    """
    cache = empty_cache(model, layout, entries, width, dtype)

    def turned(x: Array) -> Array:
        return layout.constrain(x.swapaxes(1, 2), None, "kv_heads", *(None,) * (x.ndim - 2))

    cache = jax.tree.map(turned, cache) if shared else cache
    return by_layer(cache) if layout.on_cpu else cache


def prefill(
    model: Model,
    layout: Layout,
    params: Params,
    dtype: Any,
    cache: Any,
    prompts: Prompts,
    at: Int[Array, " n"],
    there: Array,
    *,
    shared: bool,
    start: Int[Array, ""] | None = None,
    chunk: int = 0,
) -> tuple[Float[Array, "n d"], Any]:
    """Prompts through the model into entries ``at``, those that are ``there``; the hidden state of the last column.

    Whole, or with ``start`` the ``chunk`` columns from there on, whose attention reads the earlier ones in the cache.
    """
    c = model.config
    segments, positions = prompts.valid.astype(jnp.int32), row_positions(prompts.valid)
    column: Array | int = 0 if start is None else start

    def part(x: Array) -> Array:
        return x if start is None else jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)

    seen = visibility(part(positions), positions, part(segments), segments, c.sliding_window)

    def attend(q: Array, k: Array, v: Array, cache: Cache, layer: Array) -> tuple[Array, Cache]:
        k, v = (replicate_kv(x, layout).swapaxes(1, 2) for x in (k, v))
        if start is None:  # what is attended over is what the cache will hold
            held: Any = Cache(as_stored(cache.k, k), as_stored(cache.v, v))
        for i in range(at.shape[0]):
            new, place = (k[i : i + 1], v[i : i + 1]), [at[i], 0, column, 0]
            if shared:
                new, place = (k[i][:, None], v[i][:, None]), [0, at[i], column, 0]
            cache = write_layer(cache, *new, layer, place, there[i])
        cache = rows_together(cache, layout, heads_axis=1 if shared else 2)
        if start is not None:
            mine = read_layer(cache, layer)
            held = jax.tree.map(lambda x: x[:, at].swapaxes(0, 1) if shared else x[at], mine)
        keys, values = (dequantize(x, (-1,), q.dtype) for x in held)
        return attention(q, keys, values, seen, c.attention_scale), cache

    hidden, cache = forward(model, layout, params, part(prompts.tokens), part(positions), attend, cache, dtype=dtype)
    return hidden[:, -1], cache
