"""What a decode step of the refill loop reads: every slot's token against its prompt and its columns of the ring."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.models.decoder import forward, row_positions
from rljax.models.ring_kernel import ring_attend
from rljax.models.segments import Memory, Places, one_product, two_segment_attend
from rljax.refill_state import Loop, Refill, Slots


def read_tokens(r: Refill, s: Loop, token: Array, cursor: Array, columns: int) -> tuple[Float[Array, "s d"], Any]:
    """Every slot's token through the model, against its prompt and its own columns of the ring."""
    c, slots, entries = r.model.config, s.slots, s.entries
    queries = c.num_heads // max(c.num_kv_heads, r.layout.tensor)
    positions = row_positions(entries.valid)
    position = jnp.sum(entries.valid, axis=1, dtype=jnp.int32)[slots.entry] + slots.age
    back = (cursor - jnp.arange(columns)) % r.budget
    in_ring = back <= slots.age[:, None]
    places = None
    if r.plan.group == 1:
        in_prompt, distance = entries.valid, position[:, None] - positions
    elif one_product(r.layout, slots.age.shape[0], queries, *entries.valid.shape):
        mine = slots.entry[:, None] == jnp.arange(entries.open.shape[0])
        in_prompt, distance = mine[:, :, None] & entries.valid, position[:, None, None] - positions
    else:
        places = _places(r, s)
        in_prompt, distance = entries.valid[slots.entry], position[:, None] - positions[slots.entry]
    if c.sliding_window is not None:
        in_ring &= back < c.sliding_window
        in_prompt &= distance < c.sliding_window
    kernel = _ring_kernel(r, slots, cursor) if r.plan.ring_attention == "pallas" else None
    attend = two_segment_attend(cursor, in_prompt, in_ring, r.layout, c.attention_scale, places, kernel)
    memory: Any = Memory(slots.cache, entries.cache)
    if r.layout.on_cpu:
        memory = [Memory(*pair) for pair in zip(slots.cache, entries.cache, strict=True)]
    hidden, memory = forward(
        r.model, r.layout, r.params, token[:, None], position[:, None], attend, memory, dtype=r.dtype
    )
    return hidden[:, 0], [layer.ring for layer in memory] if r.layout.on_cpu else memory.ring


def _ring_kernel(r: Refill, slots: Slots, cursor: Array) -> Callable[..., Any]:
    """Interpreted where there is no TPU, as tests do."""
    window = r.model.config.sliding_window or r.budget
    ages = jnp.where(slots.running, jnp.minimum(slots.age, window - 1), -1)
    scale = r.model.config.attention_scale
    return partial(ring_attend, cursor=cursor, ages=ages, scale=scale, interpret=not r.layout.on_tpu)


def _places(r: Refill, s: Loop) -> Places:
    """Running slots only: the others may still name an entry that has gone to another group."""
    slots, entries = s.slots, s.entries.open.shape[0]
    own = slots.entry * r.plan.group + slots.request % r.plan.group
    at = jnp.where(slots.running, own, entries * r.plan.group)  # out of bounds: not written
    slot = (
        jnp.zeros(entries * r.plan.group, jnp.int32).at[at].set(jnp.arange(own.shape[0], dtype=jnp.int32), mode="drop")
    )
    return Places(slot.reshape(entries, r.plan.group), own)
