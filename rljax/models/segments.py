"""Decode-step attention over two segments: shared prompts, and each slot's own columns of a ring."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.models.attention import Attend, Cache, read_layer, replicate_kv, rows_together, write_layer
from rljax.models.layers import contract, wide_dtype
from rljax.models.quantized import Quantized, stored_values, times_row_scales
from rljax.sharding import Layout


class Memory(NamedTuple):
    """What a step attends over."""

    ring: Cache
    prompts: Cache


def two_segment_attend(cursor: Array, in_prompt: Array, in_ring: Array, layout: Layout, scale: float) -> Attend:
    """A step's keys and values into the ring, then attention over prompt and ring, merged exactly.

    ``in_ring`` is [S, C]; ``in_prompt`` [S, P] where every slot has its entry, [S, Q, P] where entries are shared: then
    all slots meet all entries in one product and the mask picks theirs, which reads a prompt once and not once a slot.
    """

    def attend(q: Array, k: Array, v: Array, memory: Memory, layer: Array) -> tuple[Array, Memory]:
        k, v = (replicate_kv(x, layout).swapaxes(1, 2) for x in (k, v))
        ring = write_layer(memory.ring, k, v, layer, (0, 0, cursor, 0))
        ring = rows_together(ring, layout, heads_axis=2)
        slots, _, heads, width = q.shape
        q_dtype, q = q.dtype, q.reshape(slots, k.shape[1], -1, width)
        if not isinstance(ring.k, Quantized):
            q = q.astype(ring.k.dtype)
        (ring_keys, ring_values), (keys, values) = read_layer(ring, layer), read_layer(memory.prompts, layer)
        own = _part("skgh,skch->skgc", "skgc,skch->skgh", q, ring_keys, ring_values, in_ring[:, None, None], scale)
        if in_prompt.ndim == 2:
            visible = in_prompt[:, None, None]
            prompt = _part("skgh,skph->skgp", "skgp,skph->skgh", q, keys, values, visible, scale)
        else:
            # [K, Q * P, H]
            keys, values = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), (keys, values))
            visible = in_prompt.reshape(slots, 1, -1)
            prompt = _part("ksgh,kxh->ksgx", "ksgx,kxh->ksgh", q.swapaxes(0, 1), keys, values, visible, scale)
            prompt = jax.tree.map(lambda x: x.swapaxes(0, 1), prompt)
        return _merged((own, prompt)).astype(q_dtype).reshape(slots, 1, heads, width), Memory(ring, memory.prompts)

    return attend


class Part(NamedTuple):
    """Attention over some of the keys: largest score, sum of exponentials below it, and their weighted values."""

    top: Float[Array, "*n"]
    total: Float[Array, "*n"]
    values: Float[Array, "*n h"]


def _part(to_scores: str, to_values: str, q: Array, k: Any, v: Any, visible: Array, scale: float) -> Part:
    wide = wide_dtype(q.dtype)
    scores = times_row_scales(contract(to_scores, q, stored_values(k), wide) * scale, k)
    scores = jnp.where(visible, scores, jnp.finfo(wide).min / 2)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    shares = times_row_scales(weights, v).astype(q.dtype)
    return Part(top, jnp.sum(weights, axis=-1), contract(to_values, shares, stored_values(v), wide))


def _merged(parts: tuple[Part, Part]) -> Float[Array, "*n h"]:
    a, b = parts
    top = jnp.maximum(a.top, b.top)
    shares = jnp.exp(a.top - top), jnp.exp(b.top - top)
    total = shares[0] * a.total + shares[1] * b.total
    return (shares[0] / total)[..., None] * a.values + (shares[1] / total)[..., None] * b.values
