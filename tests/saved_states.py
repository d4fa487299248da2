"""States to save, with leaves of every kind, and ways to compare and to damage them."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rljax.checkpoint import Checkpointer


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    algo_state: Any


def mesh(*sizes: int):
    return jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def make_state(grid, seed: int = 0, rows: int = 64) -> State:
    def build(key):
        params = {
            "embed": jax.random.normal(key, (rows, 32)),
            "layers": {"norm": jnp.ones((3, 32), jnp.bfloat16) / 3, "scale": jnp.float32(jnp.pi)},
        }
        algo_state = {"mean": jnp.array([jnp.nan, -0.0, jnp.inf]), "seen": jnp.array([True, False]), "key": key}
        return State(jnp.int32(seed), params, optax.adam(1e-3).init(params), algo_state)

    whole = NamedSharding(grid, PartitionSpec())
    shardings = jax.tree.map(lambda _: whole, jax.eval_shape(build, jax.random.key(seed)))
    split = NamedSharding(grid, PartitionSpec("fsdp", "tensor"))
    shardings.params["embed"] = split
    shardings.opt_state[0].mu["embed"] = shardings.opt_state[0].nu["embed"] = split
    return jax.jit(build, out_shardings=shardings)(jax.random.key(seed))


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(tree: Any) -> list[bytes]:
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(tree)]
    leaves = [jax.random.key_data(x) if k else x for x, k in zip(jax.tree.leaves(tree), is_key, strict=True)]
    return [np.asarray(x).tobytes() for x in leaves]


def assert_same(restored: State, expected_bits: list[bytes], template: State) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(template)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert bits(restored) == expected_bits


def two_steps(folder: Path, state: State) -> None:
    with Checkpointer(folder, keep=2) as checkpointer:
        checkpointer.save(10, state, {"at": 10}, force=True)
        checkpointer.save(20, state, {"at": 20}, force=True)


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


NAMED = r"{}/20 is damaged \(.+\); delete it to go on from step 10"
