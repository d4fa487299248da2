"""Decode attention over the ring as a Pallas kernel for TPUs: it reads only blocks that hold a slot's own columns."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from rljax.models.attention import Cache
from rljax.models.kernels import LANES
from rljax.models.segments import Part

BLOCKS = (256, LANES)  # columns; the larger that divides the ring
LOWEST = float(jnp.finfo(jnp.float32).min) / 2


def ring_attend(
    q: Float[Array, "s k g h"],
    ring: Cache,
    layer: Int[Array, ""] | None,
    *,
    cursor: Int[Array, ""],
    ages: Int[Array, " s"],
    scale: float,
    interpret: bool,
) -> Part:
    """Each slot over its last ``ages`` + 1 columns of the ring up to the cursor, none where that is 0; in float32.

    For use inside a ``shard_map`` over data: kv heads are cut over the tensor axis in one of its own.
    """
    ring = jax.tree.map(lambda x: x[None], ring) if layer is None else ring
    numbers = (jnp.int32(0) if layer is None else layer, cursor, ages)
    heads, stack, whole = PartitionSpec(None, "tensor"), PartitionSpec(None, None, "tensor"), PartitionSpec()
    shard = jax.shard_map(
        partial(ring_part, scale=scale, interpret=interpret),
        mesh=jax.sharding.get_abstract_mesh(),
        in_specs=(heads, stack, stack, whole, whole, whole),
        out_specs=heads,
        axis_names={"tensor"},
        check_vma=False,
    )
    return shard(q, ring.k, ring.v, *numbers)


def ring_part(
    q: Float[Array, "s k g h"],
    keys: Float[Array, "l s k c h"],
    values: Float[Array, "l s k c h"],
    layer: Int[Array, ""],
    cursor: Int[Array, ""],
    ages: Int[Array, " s"],
    *,
    scale: float,
    interpret: bool,
    block: int = 0,
) -> Part:
    """One device's heads. The grid goes over slots and blocks; behind a slot's last block nothing more is read."""
    # Imported where it is used: Pallas takes half a second, and only TPUs need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (slots, heads, group, width), columns = q.shape, keys.shape[3]
    block = block or next((size for size in BLOCKS if columns % size == 0), columns)
    count, read = columns // block, jnp.minimum(ages + 1, columns)
    start = jnp.where(read > 0, (cursor + columns - ages) % columns, 0)
    first, blocks = start // block, jnp.minimum((start % block + read + block - 1) // block, count)
    scalars = [jnp.int32(x) for x in (layer[None], cursor[None], ages, first, jnp.where(read > 0, blocks, 0))]

    def of_slot(s: Any, j: Any, *scalars: Any) -> tuple[Any, ...]:
        return s, 0, 0, 0

    def of_ring(s: Any, j: Any, layer: Any, cursor: Any, ages: Any, first: Any, blocks: Any) -> tuple[Any, ...]:
        last = jnp.maximum(blocks[s] - 1, 0)  # the same block again is not fetched again
        return layer[0], s, 0, (first[s] + jnp.minimum(j, last)) % count, 0

    def row(lanes: int) -> Any:
        return pl.BlockSpec((1, heads, group, lanes), of_slot)

    ring = pl.BlockSpec((1, 1, heads, block, width), of_ring)
    shapes = [jax.ShapeDtypeStruct((slots, heads, group, lanes), jnp.float32) for lanes in (LANES, LANES, width)]
    top, total, weighted = pl.pallas_call(
        partial(_ring_block, scale=scale, columns=columns),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(slots, count),
            in_specs=[row(width), ring, ring],
            out_specs=[row(LANES), row(LANES), row(width)],
        ),
        out_shape=shapes,
        interpret=interpret,
    )(*scalars, q, keys, values)
    return Part(top[..., 0], total[..., 0], weighted)


def _ring_block(
    layer: Any,
    cursor: Any,
    ages: Any,
    first: Any,
    blocks: Any,
    q: Any,
    keys: Any,
    values: Any,
    top: Any,
    total: Any,
    weighted: Any,
    *,
    scale: float,
    columns: int,
) -> None:
    """One block of one slot, added to what the blocks before it gave (2112.05682)."""
    from jax.experimental import pallas as pl

    s, j = pl.program_id(0), pl.program_id(1)
    heads, block = keys.shape[2:4]

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, LOWEST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        weighted[...] = jnp.zeros(weighted.shape, jnp.float32)

    @pl.when(j < blocks[s])
    def _() -> None:
        start = jax.lax.rem(first[s] + j, columns // block) * block
        column = start + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        visible = jax.lax.rem(cursor[0] - column + columns, columns) <= ages[s]
        for head in range(heads):
            scores = _product(q[0, head], keys[0, 0, head], 1) * scale
            scores = jnp.where(visible, scores, LOWEST)
            before = top[0, head][:, :1]
            highest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            weights, kept = jnp.exp(scores - highest), jnp.exp(before - highest)
            total[0, head] = total[0, head] * kept + jnp.sum(weights, axis=1, keepdims=True)
            new = _product(weights.astype(values.dtype), values[0, 0, head], 0)
            weighted[0, head] = weighted[0, head] * kept + new
            top[0, head] = jnp.broadcast_to(highest, top.shape[2:])


def _product(a: Array, b: Array, summed: int) -> Array:
    return jax.lax.dot_general(a, b, (((1,), (summed,)), ((), ())), preferred_element_type=jnp.float32)
