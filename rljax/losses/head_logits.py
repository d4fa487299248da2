"""Logits from hidden states and a head, in chunks of tokens: the products, and what needs whole rows of logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rljax.losses.masked import at_least_float32
from rljax.losses.shapes import Given, check_shapes, refuse_unequal


@check_shapes
def reduce_logits_in_chunks(
    hidden: Float[Array, "n d"],
    head: Float[Array, "v d"],
    reducer: Callable[..., Any],
    rows: tuple[Any, ...] = (),
    *,
    chunk_size: int,
    vocab_size: int | None = None,
    count: Int[Array, ""] | None = None,
) -> Any:
    """``reducer(logits, *rows)`` for what needs whole rows of logits (exact KL, Jensen-Shannon, a second head).

    ``rows`` are pytrees of [n, ...] arrays cut along with ``hidden``; ``reducer`` sees chunks of them beside float32
    logits [chunk, v] and returns a pytree of [chunk, ...] arrays, which come back as [n, ...]. Each chunk is
    rematerialised in the backward pass, so nothing of size [n, v] is saved. What ``reducer`` closes over gets gradients
    too; for a second head call ``head_logits`` in it.

    With ``count`` only that many tokens, the first, are looked at, in both directions and known at run time only: the
    others get zeros and cost nothing.
    """
    check_head(head, chunk_size, vocab_size, 1.0)
    for path, x in jax.tree_util.tree_leaves_with_path(rows):
        like = Given("hidden", ("n", "d"), hidden.shape)
        refuse_unequal(
            "reduce_logits_in_chunks", [like, Given(f"rows{jax.tree_util.keystr(path)}", ("n", "..."), x.shape)]
        )
    head = at_least_float32(varying_like(head, hidden))  # its gradient is summed over chunks

    def chunk(head, arrays):
        hidden_chunk, rows_chunk = arrays
        return reducer(head_logits(hidden_chunk, head, vocab_size=vocab_size), *rows_chunk)

    if count is not None:
        return _reduce_first(chunk, head, (hidden, rows), chunk_size, count)
    remade = jax.checkpoint(partial(chunk, head))
    return scan_chunks(lambda _, arrays: (None, remade(arrays)), None, (hidden, rows), chunk_size)[1]


def _reduce_first(chunk: Callable, head: Array, arrays: Any, chunk_size: int, count: Array) -> Any:
    """``chunk(head, arrays)`` of the first ``count`` tokens, a chunk at a time, and zeros."""
    n = len(jax.tree.leaves(arrays)[0])
    floats, others = _floats(arrays), _floats(arrays, others=True)

    def merged(head: Array, floats: Any, others: Any) -> Any:
        return chunk(head, jax.tree.map(lambda x, y: y if x is None else x, floats, others, is_leaf=_is_none))

    some = jax.tree.map(lambda x: x[: _chunk_rows(n, chunk_size)], (floats, others))
    run, closed = jax.closure_convert(merged, head, *some)
    results = _counted(run, chunk_size, (head, *closed), floats, others, count)
    return jax.tree.map(
        lambda x: jnp.where((jnp.arange(n) < count).reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x)), results
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _counted(run: Callable, chunk_size: int, consts: tuple, floats: Any, others: Any, count: Array) -> Any:
    def chunk(_: None, arrays: tuple) -> tuple[None, Any]:
        return None, run(consts[0], *arrays, *consts[1:])

    return scan_chunks(chunk, None, (floats, others), chunk_size, count)[1]


def _counted_fwd(run: Callable, chunk_size: int, *inputs: Any) -> tuple[Any, tuple]:
    return _counted(run, chunk_size, *inputs), inputs


def _counted_bwd(run: Callable, chunk_size: int, saved: tuple, cotangents: Any) -> tuple:
    consts, floats, others, count = saved

    def chunk(d_consts: tuple, arrays: tuple) -> tuple[tuple, Any]:
        floats, others, cotangents = arrays
        _, pull = jax.vjp(lambda c, f: _floats(run(c[0], f, others, *c[1:])), consts, floats)
        more, d_floats = pull(cotangents)
        return jax.tree.map(jnp.add, d_consts, more), d_floats

    zeros = jax.tree.map(jnp.zeros_like, consts)
    d_consts, d_floats = scan_chunks(chunk, zeros, (floats, others, _floats(cotangents)), chunk_size, count)
    return d_consts, d_floats, None, None


_counted.defvjp(_counted_fwd, _counted_bwd)


def _floats(tree: Any, others: bool = False) -> Any:
    """What has a gradient, or the rest; None in the other places."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) != others else None, tree)


def _is_none(x: Any) -> bool:
    return x is None


@check_shapes
def head_logits(
    hidden: Float[Array, "n d"], head: Float[Array, "v d"], *, vocab_size: int | None = None
) -> Float[Array, "n v"]:
    """``hidden · headᵀ`` in float32, -inf from ``vocab_size`` on; cotangents are cast to ``hidden``'s dtype."""
    logits = _product(hidden, head)
    return logits if vocab_size in (None, head.shape[0]) else hide_padding(logits, vocab_size)


@jax.custom_vjp
def _product(hidden: Array, head: Array) -> Array:
    return dot(hidden, head.astype(hidden.dtype), (1, 1))


def _product_fwd(hidden: Array, head: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(hidden, head), (hidden, head)


def _product_bwd(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    hidden, head = saved
    d_hidden, d_head = product_transposed(cotangent, hidden, head.astype(hidden.dtype))
    return d_hidden, d_head.astype(head.dtype)


_product.defvjp(_product_fwd, _product_bwd)


def product_transposed(cotangent: Array, hidden: Array, head: Array) -> tuple[Array, Array]:
    """Cotangents of ``hidden`` (in its dtype) and ``head`` (float32); both operands of both products in one dtype."""
    cotangent = cotangent.astype(hidden.dtype)
    return dot(cotangent, head, (1, 0)).astype(hidden.dtype), dot(cotangent, hidden, (0, 0))


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=dtype)


def hide_padding(logits: Array, real: int | Array) -> Array:
    """-inf from column ``real`` on."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, logits.shape, 1) < real, logits, -jnp.inf)


def scan_chunks(chunk: Callable, carry: Any, arrays: Any, chunk_size: int, count: Array | None = None) -> Any:
    """``lax.scan`` of ``chunk`` over chunks of [n, ...] arrays; with ``count``, over those of the first tokens only."""
    n = len(jax.tree.leaves(arrays)[0])
    if count is None:
        carry, results = lax.scan(chunk, carry, jax.tree.map(partial(split_chunks, chunk_size=chunk_size), arrays))
        return carry, jax.tree.map(partial(join_chunks, n=n), results)
    rows = _chunk_rows(n, chunk_size)
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, -n % rows)] + [(0, 0)] * (x.ndim - 1)), arrays)

    def cut(start: Array) -> Any:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, rows), padded)

    def step(number: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, results = chunk(state[0], cut(number * rows))
        write = partial(lax.dynamic_update_slice_in_dim, start_index=number * rows, axis=0)
        return carry, jax.tree.map(write, state[1], results)

    shapes = jax.eval_shape(lambda: chunk(carry, cut(jnp.int32(0)))[1])
    empty = jax.tree.map(lambda s: jnp.zeros((n + -n % rows, *s.shape[1:]), s.dtype), shapes)
    used = (count + rows - 1) // rows
    carry, results = lax.fori_loop(0, used.astype(jnp.int32), step, (carry, empty))
    return carry, jax.tree.map(lambda x: x[:n], results)


def _chunk_rows(n: int, chunk_size: int) -> int:
    """Of chunks that are as equal as can be."""
    return -(-n // max(1, -(-n // chunk_size)))


def split_chunks(x: Array, chunk_size: int) -> Array:
    """[n, ...] to [chunks, rows, ...], zero-padded; strided over n, so that a sharded n is sharded in every chunk."""
    n = x.shape[0]
    chunks = max(1, -(-n // chunk_size))
    rows = -(-n // chunks)
    x = jnp.pad(x, [(0, chunks * rows - n)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(rows, chunks, *x.shape[1:]).swapaxes(0, 1)


def join_chunks(x: Array, n: int) -> Array:
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:n]


def varying_like(head: Array, hidden: Array) -> Array:
    """Inside ``shard_map``: ``head`` varying over the axes of ``hidden``, so that its gradient is summed over them."""
    return head + jnp.zeros_like(hidden, shape=(), dtype=head.dtype)  # the compiler drops the sum, not the type


def check_head(head: Array, chunk_size: int, vocab_size: int | None, temperature: float) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; give the tokens of a chunk, at least 1")
    if vocab_size is not None and not 1 <= vocab_size <= head.shape[0]:
        raise ValueError(
            f"vocab_size {vocab_size} does not fit a head of {head.shape[0]} rows; give 1 to {head.shape[0]}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probs need one above 0 (greedy is a sampler's setting)")
