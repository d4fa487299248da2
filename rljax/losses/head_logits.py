"""Logits from hidden states and a head, in chunks of tokens: the products, and what needs whole rows of logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

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
) -> Any:
    """``reducer(logits, *rows)`` for what needs whole rows of logits (exact KL, Jensen-Shannon, a second head).

    ``rows`` are pytrees of [n, ...] arrays cut along with ``hidden``; ``reducer`` sees chunks of them beside float32
    logits [chunk, v] and returns a pytree of [chunk, ...] arrays, which come back as [n, ...]. Each chunk is
    rematerialised in the backward pass, so nothing of size [n, v] is saved. What ``reducer`` closes over gets gradients
    too; for a second head call ``head_logits`` in it.
    """
    check_head(head, chunk_size, vocab_size, 1.0)
    for path, x in jax.tree_util.tree_leaves_with_path(rows):
        like = Given("hidden", ("n", "d"), hidden.shape)
        refuse_unequal(
            "reduce_logits_in_chunks", [like, Given(f"rows{jax.tree_util.keystr(path)}", ("n", "..."), x.shape)]
        )
    head = at_least_float32(varying_like(head, hidden))  # its gradient is summed over chunks

    @jax.checkpoint
    def chunk(arrays):
        hidden_chunk, rows_chunk = arrays
        return reducer(head_logits(hidden_chunk, head, vocab_size=vocab_size), *rows_chunk)

    n = hidden.shape[0]
    chunks = jax.tree.map(partial(split_chunks, chunk_size=chunk_size), (hidden, rows))
    return jax.tree.map(partial(join_chunks, n=n), lax.map(chunk, chunks))


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
