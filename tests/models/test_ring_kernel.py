"""The kernel over the ring, interpreted, against the XLA path; what it leaves unread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.ring_kernel import ring_part
from rljax.models.segments import Part, _part

SLOTS, HEADS, GROUP, COLUMNS, WIDTH, BLOCK = 6, 2, 3, 32, 16, 8
AGES = jnp.array([-1, 0, 5, COLUMNS - 1, 12, 20], jnp.int32)  # idle, just begun, ..., a full ring


def inputs(dtype: jnp.dtype) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = ((SLOTS, HEADS, GROUP, WIDTH), *((2, SLOTS, HEADS, COLUMNS, WIDTH),) * 2)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def kernel(q: jax.Array, keys: jax.Array, values: jax.Array, cursor: int) -> Part:
    place = (jnp.int32(1), jnp.int32(cursor), AGES)
    return ring_part(q, keys, values, *place, scale=0.3, interpret=True, block=BLOCK)


def back(cursor: int) -> np.ndarray:
    return (cursor - np.arange(COLUMNS)) % COLUMNS


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("cursor", [3, 15, 31])
def test_the_kernel_gives_what_xla_gives(dtype: jnp.dtype, tolerance: float, cursor: int) -> None:
    """Most slots' columns go over the end of the ring; kv heads serve three queries each."""
    q, keys, values = inputs(dtype)
    visible = jnp.asarray(back(cursor)) <= AGES[:, None]
    other = _part("skgh,skch->skgc", "skgc,skch->skgh", q, keys[1], values[1], visible[:, None, None], 0.3)
    mine = kernel(q, keys, values, cursor)
    for ours, theirs in zip(mine, other, strict=True):
        np.testing.assert_allclose(ours[1:], theirs[1:], rtol=tolerance, atol=tolerance)
    assert not mine.total[0].any() and not mine.values[0].any()  # an idle slot adds nothing


def test_blocks_without_a_column_of_the_slot_are_not_read() -> None:
    """They hold NaN, and so does the other layer."""
    cursor = 3
    q, keys, values = inputs(jnp.float32)
    used = (back(cursor) <= AGES[:, None]).reshape(SLOTS, -1, BLOCK).any(axis=2).repeat(BLOCK, axis=1)
    unread = jnp.asarray(~used)[:, None, :, None] | (jnp.arange(2) == 0)[:, None, None, None, None]
    assert used.mean() < 0.7
    mine = kernel(q, *(jnp.where(unread, jnp.nan, x) for x in (keys, values)), cursor)
    for ours, theirs in zip(mine, kernel(q, keys, values, cursor), strict=True):
        np.testing.assert_array_equal(ours, theirs)
