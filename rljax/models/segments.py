"""Decode-step attention over two segments: shared prompts, and each slot's own columns of a ring."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models.attention import Attend, Cache, read_layer, replicate_kv, rows_together, write_layer
from rljax.models.layers import contract, wide_dtype
from rljax.models.quantized import Quantized, stored_values, times_row_scales
from rljax.sharding import Layout

# On CPUs, whose products of small matrices are slow, all slots meet all shared prompts in one product while its scores
# are at most so many a kv head: 1 MiB, which stays in a core's cache. Beyond, the needless ones cost more.
MOST_SCORES = 2**18


class Memory(NamedTuple):
    """What a step attends over."""

    ring: Cache
    prompts: Cache


class Places(NamedTuple):
    """Who reads which entry: G places an entry, one for each sample of its group."""

    slot: Int[Array, "q g"]  # the slot whose sample it is; any slot where there is none
    own: Int[Array, " s"]  # a slot's place: entry * G + sample


def one_product(layout: Layout, slots: int, heads: int, entries: int, columns: int) -> bool:
    """Whether all ``slots`` meet all entries in one product, with ``heads`` queries for each kv head."""
    return layout.on_cpu and slots * heads * entries * columns <= MOST_SCORES


def two_segment_attend(
    cursor: Array,
    in_prompt: Array,
    in_ring: Array,
    layout: Layout,
    scale: float,
    places: Places | None = None,
    ring_kernel: Callable[[Array, Cache, Any], "Part"] | None = None,
) -> Attend:
    """A step's keys and values into the ring, then attention over prompt and ring, merged exactly.

    ``in_ring`` is [S, C]. ``in_prompt`` is [S, P], a slot's own entry; where entries are shared it comes with
    ``places``, or is [S, Q, P]: then all slots meet all entries in one product and the mask picks theirs.
    ``ring_kernel`` (q, ring, layer) takes the ring's part, without ``in_ring``.
    """

    def attend(q: Array, k: Array, v: Array, memory: Memory, layer: Array) -> tuple[Array, Memory]:
        k, v = (replicate_kv(x, layout).swapaxes(1, 2) for x in (k, v))
        ring = write_layer(memory.ring, k, v, layer, (0, 0, cursor, 0))
        ring = rows_together(ring, layout, heads_axis=2)
        slots, _, heads, width = q.shape
        q_dtype, q = q.dtype, q.reshape(slots, k.shape[1], -1, width)
        if not isinstance(ring.k, Quantized):
            q = q.astype(ring.k.dtype)
        if ring_kernel is None:
            mine, visible = read_layer(ring, layer), in_ring[:, None, None]
            own = _part("skgh,skch->skgc", "skgc,skch->skgh", q, mine.k, mine.v, visible, scale)
        else:
            own = ring_kernel(q, ring, layer)
        prompt = _prompt_part(q, read_layer(memory.prompts, layer), in_prompt, places, scale)
        return _merged((own, prompt)).astype(q_dtype).reshape(slots, 1, heads, width), Memory(ring, memory.prompts)

    return attend


class Part(NamedTuple):
    """Attention over some of the keys: largest score, sum of exponentials below it, and their weighted values."""

    top: Float[Array, "*n"]
    total: Float[Array, "*n"]
    values: Float[Array, "*n h"]


def _prompt_part(q: Array, stored: Cache, in_prompt: Array, places: Places | None, scale: float) -> Part:
    if places is not None:
        return _by_entry(q, stored, in_prompt, places, scale)
    if in_prompt.ndim == 2:
        return _part("skgh,skph->skgp", "skgp,skph->skgh", q, stored.k, stored.v, in_prompt[:, None, None], scale)
    # [K, Q * P, H]
    keys, values = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), stored)
    visible = in_prompt.reshape(q.shape[0], 1, -1)
    part = _part("ksgh,kxh->ksgx", "ksgx,kxh->ksgh", q.swapaxes(0, 1), keys, values, visible, scale)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), part)


def _by_entry(q: Array, stored: Cache, in_prompt: Array, places: Places, scale: float) -> Part:
    """Queries go to their entries' places and the results back: an entry is read once and meets its own group only."""
    _, kv_heads, group, width = q.shape
    entries, samples = places.slot.shape
    asked = q[places.slot].transpose(2, 0, 1, 3, 4).reshape(kv_heads, entries, samples * group, width)
    visible = jnp.repeat(in_prompt[places.slot], group, axis=1)
    part = _part("kqmh,kqph->kqmp", "kqmp,kqph->kqmh", asked, stored.k, stored.v, visible, scale)

    def back(x: Array) -> Array:
        return x.reshape(kv_heads, entries * samples, group, *x.shape[3:])[:, places.own].swapaxes(0, 1)

    return jax.tree.map(back, part)


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
