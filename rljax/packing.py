"""Rows in pieces, and rows of different lengths packed into bins: arrays of a fixed shape, partly in use.

Every micro-batch has the same number of bins on every data shard; a row is put, whole, into one of them. Where rows go
follows from their lengths alone and is worked out inside the programs: no host has to know, and nothing compiles again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from rljax.algos.base import Batch
from rljax.sharding import BATCH_AXES, Layout
from rljax.types import PyTree

# Rows that a micro-batch holds at most, for each of its bins: what per-token numbers of its rows are sized for.
ROWS_PER_BIN = 8


@dataclass(frozen=True)
class Packing:
    """The declared worst case, a row a bin, on one data shard."""

    micro_batches: int
    bins: int  # of a micro-batch
    length: int  # tokens of a bin; no row is longer
    unit: int = 1  # consecutive rows that go through in one micro-batch

    @property
    def rows(self) -> int:
        """Of a micro-batch, at most."""
        return min(self.micro_batches, ROWS_PER_BIN) * self.bins


class Places(NamedTuple):
    """Where each row of a batch is."""

    micro_batch: Int[Array, " n"]
    start: Int[Array, " n"]  # of its tokens, among those of all bins of the micro-batch
    used: Int[Array, ""]  # micro-batches with rows


def make_packing(batch: Batch, layout: Layout, micro_batches: int, bin_length: int, unit: int = 1) -> Packing:
    """The packing of a batch whose micro-batches have one row a bin at worst; ``bin_length`` 0 is the rows' width.

    Raises ValueError where the longest row does not fit, or where micro-batches would not be equal or cut a unit.
    """
    rows, width = batch["tokens"].shape
    if rows % (micro_batches * layout.data_shards):
        raise ValueError(
            f"{rows} rows do not divide into {micro_batches} micro-batches over {layout.data_shards} data shards"
        )
    if bin_length and bin_length < width:
        raise ValueError(f"batch.row_length is {bin_length} and rows have up to {width} tokens; raise it or leave it 0")
    bins = rows // (micro_batches * layout.data_shards)
    if bins % unit:
        raise ValueError(
            f"micro-batches have {bins} rows on each of {layout.data_shards} data shards, which are not whole units of "
            f"{unit}; change batch.micro_batch_rows"
        )
    return Packing(micro_batches, bins, bin_length or width, unit)


def place_rows(packing: Packing, lengths: Int[Array, " n"]) -> Places:
    """First fit, longest unit first: each row in the first bin with room, in the first micro-batch that takes its unit.

    A row a bin always fits: if a unit finds no place, every micro-batch has its full number of units.
    """
    units = lengths.reshape(-1, packing.unit)
    order = jnp.argsort(-jnp.max(units, axis=1), stable=True)
    every = jnp.arange(packing.micro_batches)

    def place(carry: tuple[Array, Array], rows: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        room, taken = carry  # tokens of each bin, rows of each micro-batch
        fits = taken + packing.unit <= packing.rows
        left, starts = room, []
        for length in rows:  # of one unit
            fits &= jnp.any(left >= length, axis=1)
            chosen = jnp.argmax(left >= length, axis=1)
            starts.append(chosen * packing.length + packing.length - left[every, chosen])
            left = left.at[every, chosen].add(-length)
        m = jnp.argmax(fits).astype(jnp.int32)
        starts_there = jnp.stack(starts)[:, m].astype(jnp.int32)
        return (room.at[m].set(left[m]), taken.at[m].add(packing.unit)), (m, starts_there)

    room = jnp.full((packing.micro_batches, packing.bins), packing.length, jnp.int32)
    _, (where, starts) = jax.lax.scan(place, (room, jnp.zeros_like(every)), units[order])
    unit_of = jnp.zeros_like(where).at[order].set(where)
    start = jnp.zeros_like(starts).at[order].set(starts)
    return Places(jnp.repeat(unit_of, packing.unit), start.reshape(-1), jnp.max(where) + 1)


def pack(packing: Packing, layout: Layout, valid: Bool[Array, "n t"]) -> Places:
    """Of a global batch, every data shard's rows by themselves; ``used`` is the most that any shard has."""

    def shard(valid: Array) -> tuple[Array, Array, Array]:
        places = place_rows(packing, jnp.sum(valid, axis=1, dtype=jnp.int32))
        return places.micro_batch, places.start, places.used[None]

    micro_batch, start, used = by_shard(layout, shard)(valid)
    return Places(micro_batch, start, jnp.max(used))


def take_packed(packing: Packing, layout: Layout, batch: Batch, places: Places, number: Int[Array, ""]) -> Batch:
    """The rows of a micro-batch as [rows, t] and, beside them, its bins.

    Rows that it has not are empty and not ``real``. ``place`` says where in the bins (all of a data shard in one line)
    a token is; ``bin_tokens``, ``bin_segments`` and ``bin_positions`` are what the model reads.
    """
    size = packing.bins * packing.length

    def shard(number: Array, batch: Batch, micro_batch: Array, start: Array) -> Batch:
        n = micro_batch.shape[0]
        rows = jnp.nonzero(micro_batch == number, size=packing.rows, fill_value=n)[0]
        taken = jax.tree.map(lambda x: x.at[rows].get(mode="fill", fill_value=0), {**batch, "start": start})
        valid = taken["valid"]
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0).astype(jnp.int32)
        place = jnp.where(valid, taken.pop("start")[:, None] + positions, size)

        def binned(x: Array) -> Array:
            return jnp.zeros(size, x.dtype).at[place].set(x, mode="drop").reshape(packing.bins, packing.length)

        slots = jnp.broadcast_to(jnp.arange(1, packing.rows + 1, dtype=jnp.int32)[:, None], place.shape)
        bins = {"bin_tokens": taken["tokens"], "bin_segments": slots, "bin_positions": positions}
        return {**taken, "real": rows < n, "place": place, **{name: binned(x) for name, x in bins.items()}}

    return by_shard(layout, shard, whole=1)(number, batch, places.micro_batch, places.start)


def put_rows(
    packing: Packing, layout: Layout, results: Any, places: Places, number: Int[Array, ""], values: Any
) -> Any:
    """``results`` [n, ...] with those of a micro-batch's rows, which are ``values`` [rows, ...]."""

    def shard(number: Array, results: Any, micro_batch: Array, values: Any) -> Any:
        rows = jnp.nonzero(micro_batch == number, size=packing.rows, fill_value=micro_batch.shape[0])[0]
        return jax.tree.map(lambda r, v: r.at[rows].set(v, mode="drop"), results, values)

    return by_shard(layout, shard, whole=1)(number, results, places.micro_batch, values)


def by_shard(layout: Layout, run: Callable, whole: int = 0) -> Callable:
    """``run`` on each data shard's own rows; its first ``whole`` arguments are the same everywhere."""
    if layout.data_shards == 1:  # XLA cannot partition the derivative where the manual axes have size 1
        return run
    rows = PartitionSpec(BATCH_AXES)

    def sharded(*arguments: Any) -> Any:
        specs = tuple(PartitionSpec() if i < whole else rows for i in range(len(arguments)))
        wrap = partial(jax.shard_map, mesh=layout.mesh, axis_names=set(BATCH_AXES), check_vma=False)
        return wrap(run, in_specs=specs, out_specs=rows)(*arguments)

    return sharded


def cut_rows(tree: PyTree, pieces: int, layout: Layout) -> PyTree:
    """[rows, ...] to [pieces, rows / pieces, ...]; each piece takes its share from every data shard: nothing moves."""
    shards = layout.data_shards

    def cut(x: Array) -> Array:
        per_shard = x.reshape(shards, pieces, x.shape[0] // (shards * pieces), *x.shape[1:])
        pieces_first = per_shard.swapaxes(0, 1).reshape(pieces, x.shape[0] // pieces, *x.shape[1:])
        return layout.constrain(pieces_first, None, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(cut, tree)


def take_rows(tree: PyTree, rows: Int[Array, "pieces n"], layout: Layout) -> PyTree:
    """[rows, ...] to [pieces, n, ...] by number, each piece over all data shards."""
    return jax.tree.map(lambda x: layout.constrain(x[rows], None, "batch", *(None,) * (x.ndim - 1)), tree)


def join_rows(tree: PyTree, layout: Layout) -> PyTree:
    """The inverse of ``cut_rows``."""
    shards = layout.data_shards

    def join(x: Array) -> Array:
        pieces, rows = x.shape[:2]
        per_shard = x.reshape(pieces, shards, rows // shards, *x.shape[2:]).swapaxes(0, 1)
        return layout.constrain(per_shard.reshape(pieces * rows, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(join, tree)


def map_rows(run: Callable[[Batch], Any], batch: Batch, pieces: int, bin_length: int | None, layout: Layout) -> Any:
    """``run`` of every row, a piece of the rows at a time; packed where there are several and bins are asked for.

    Pieces are equal: where ``pieces`` does not divide the rows of a data shard, the next larger number that does.
    """
    rows = batch["tokens"].shape[0]
    a_shard = rows // layout.data_shards
    pieces = next(n for n in range(min(pieces, a_shard), a_shard + 1) if a_shard % n == 0)
    if bin_length is None or pieces == 1:
        return join_rows(jax.lax.map(run, cut_rows(batch, pieces, layout)), layout)
    packing = make_packing(batch, layout, pieces, bin_length)
    places = pack(packing, layout, batch["valid"])

    def piece(number: Array, results: Any) -> Any:
        values = run(take_packed(packing, layout, batch, places, number))
        return put_rows(packing, layout, results, places, number, values)

    shapes = jax.eval_shape(lambda: run(take_packed(packing, layout, batch, places, jnp.int32(0))))

    def nothing(s: jax.ShapeDtypeStruct) -> Array:
        return layout.constrain(jnp.zeros((rows, *s.shape[1:]), s.dtype), "batch", *(None,) * (len(s.shape) - 1))

    empty = jax.tree.map(nothing, shapes)
    return jax.lax.fori_loop(0, places.used, piece, empty)
