"""Log-probs and entropy from hidden states and a head, chunk by chunk: no [tokens, vocabulary] buffer either way."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from rljax.losses.head_logits import (
    check_head,
    dot,
    hide_padding,
    product_transposed,
    scan_chunks,
    varying_like,
)
from rljax.losses.logprobs import (
    LogprobStats,
    entropy_from,
    keep_support,
    log_normalizer,
    select,
    token_mask,
    without_inf,
)
from rljax.losses.shapes import check_shapes


@check_shapes
def chunked_logprobs(
    hidden: Float[Array, "n d"],
    head: Float[Array, "v d"],
    targets: Int[Array, " n"],
    *,
    chunk_size: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    support: Float[Array, " n"] | None = None,
    with_entropy: bool = False,
    count: Int[Array, ""] | None = None,
    vocab_block: int | None = None,
) -> LogprobStats:
    """Log-probs (on ``support`` if given) and entropy (of the full distribution) of ``targets``; no [n, v] buffer.

    A scan over chunks of at most ``chunk_size`` tokens whose derivative is written by hand: the forward pass keeps
    numbers per token only, the backward pass computes the chunk's logits again. Rows of ``head`` from ``vocab_size`` on
    are padding. ``head`` may be wider than ``hidden`` (float32 parameters, bfloat16 compute): products take operands
    in ``hidden``'s dtype and accumulate in float32, and so does the gradient of ``head``. Under ``jit`` it follows the
    shardings of ``hidden`` over n and ``head`` over v; inside ``shard_map`` over the data axes the gradient of ``head``
    is reduced once instead of once a chunk.

    With ``count`` only that many tokens, the first, are looked at, in both directions and known at run time only: the
    others get 0 and cost nothing. With ``vocab_block`` a chunk's logits exist for about so many entries of the
    vocabulary at a time, as a CPU's caches like it; a head that is sharded over v cannot be cut so.
    """
    check_head(head, chunk_size, vocab_size, temperature)
    if vocab_block is not None and vocab_block < 1:
        raise ValueError(f"vocab_block is {vocab_block}; give the entries of a block, at least 1, or None")
    head = varying_like(head, hidden)
    n, v = hidden.shape[0], head.shape[0]
    options = _Options(
        chunk_size,
        temperature,
        vocab_size or v,
        support is not None,
        with_entropy,
        count is not None,
        vocab_blocks=count_blocks(v, vocab_block or v),
    )
    if support is None:
        support = jnp.zeros(targets.shape, jnp.float32)  # not read
    logprobs, entropies = _chunked(options, hidden, head, targets, support, jnp.int32(n) if count is None else count)
    if count is not None:
        logprobs, entropies = (jnp.where(jnp.arange(n) < count, x, 0) for x in (logprobs, entropies))
    return LogprobStats(logprobs, entropies if with_entropy else None)


class _Options(NamedTuple):
    chunk_size: int
    temperature: float
    vocab_size: int
    truncated: bool
    with_entropy: bool
    counted: bool  # how many tokens there are is known at run time
    vocab_blocks: int


def count_blocks(vocab: int, longest: int) -> int:
    """Into how many equal blocks of at most ``longest`` entries a vocabulary is cut; 1 where they would be tiny."""
    block = max(size for size in range(1, min(longest, vocab) + 1) if vocab % size == 0)
    return vocab // block if 2 * block > longest else 1


def _table_blocks(options: _Options, table: Array) -> tuple[Array, Array]:
    """[blocks, v / blocks, d], and where in the vocabulary each begins."""
    blocks = table.reshape(options.vocab_blocks, -1, table.shape[-1])
    return blocks, jnp.arange(options.vocab_blocks) * blocks.shape[1]


class _Logits(NamedTuple):
    """A chunk's logits of a block of the vocabulary, over the temperature."""

    scaled: Array
    is_token: Array
    inside: Array  # -inf outside the support


def _logits(options: _Options, hidden: Array, table: Array, first: Array, targets: Array, support: Array) -> _Logits:
    scaled = dot(hidden, table, (1, 1)) / options.temperature
    if options.vocab_size < options.vocab_blocks * table.shape[0]:
        scaled = hide_padding(scaled, options.vocab_size - first)
    is_token = token_mask(scaled, targets - first.astype(targets.dtype))
    return _Logits(scaled, is_token, keep_support(scaled, support, is_token) if options.truncated else scaled)


def narrowed(x: Array, dtype: Any) -> Array:
    """``x`` in ``dtype``: float32 to bfloat16 by whole numbers, which XLA vectorises on CPUs and its conversion not."""
    if (x.dtype, dtype) != (jnp.float32, jnp.bfloat16):
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    nearest = (bits + jnp.uint32(0x7FFF) + ((bits >> 16) & jnp.uint32(1))) >> 16  # ties to even
    nearest = jnp.where(jnp.isnan(x), jnp.uint32(0x7FC0), nearest)  # rounding must not carry it over to 0
    return lax.bitcast_convert_type(nearest.astype(jnp.uint16), jnp.bfloat16)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    options: _Options, hidden: Array, head: Array, targets: Array, support: Array, count: Array
) -> tuple[Array, Array]:
    return _chunked_fwd(options, hidden, head, targets, support, count)[0]


def _chunked_fwd(options, *inputs):
    inputs = tuple(x.value if isinstance(x, CustomVJPPrimal) else x for x in inputs)
    hidden, head, targets, support, count = inputs
    counted = count if options.counted else None
    tables = _table_blocks(options, head.astype(hidden.dtype))

    def chunk(_, arrays):
        hidden_chunk, targets_chunk, support_chunk = arrays

        def block(table_and_first):
            table, first = table_and_first
            z = _logits(options, hidden_chunk, table, first, targets_chunk, support_chunk)
            full = log_normalizer(z.scaled)
            kept = log_normalizer(z.inside) if options.truncated else full
            nats = entropy_from(z.scaled, without_inf(full)) if options.with_entropy else jnp.zeros_like(full)
            return select(z.scaled, z.is_token), nats, full, kept

        if options.vocab_blocks == 1:
            chosen, nats, full, kept = block(jax.tree.map(lambda x: x[0], tables))
            return None, (chosen - kept, nats, full, kept)
        chosen, nats, fulls, kepts = (x.T for x in lax.map(block, tables))
        full, kept = log_normalizer(fulls), log_normalizer(kepts)
        if options.with_entropy:  # which block, and which entry of it
            nats = entropy_from(fulls, full) + jnp.sum(jnp.exp(fulls - full[:, None]) * nats, axis=-1)
        else:
            nats = jnp.zeros_like(full)
        return None, (jnp.sum(chosen, axis=-1) - kept, nats, full, kept)

    _, results = scan_chunks(chunk, None, (hidden, targets, support), options.chunk_size, counted)
    logprobs, nats, full, kept = results
    return (logprobs, nats), (hidden, head, targets, support, count, full, kept, nats)


def _chunked_bwd(options, saved, cotangents):
    hidden, head, targets, support, count, full, kept, nats = saved
    tables = _table_blocks(options, head.astype(hidden.dtype))

    def chunk(d_head, arrays):
        hidden_chunk, targets_chunk, support_chunk, full, kept, nats, d_logprobs, d_nats = arrays
        kept = kept if options.truncated else full

        def d_logits(table, first):
            z = _logits(options, hidden_chunk, table, first, targets_chunk, support_chunk)
            # d logprob / d z_v = 1[v = token] - q_v on the kept set, d H / d z_v = -p_v (log p_v + H) on the whole.
            q = jnp.exp(z.inside - kept[:, None])
            d_scaled = d_logprobs[:, None] * (z.is_token - q)
            if d_nats is not None:
                logp = z.scaled - full[:, None]
                p = jnp.exp(logp) if options.truncated else q
                d_scaled -= d_nats[:, None] * p * (without_inf(logp) + nats[:, None])
            return d_scaled / options.temperature

        if options.vocab_blocks == 1:
            table, first = jax.tree.map(lambda x: x[0], tables)
            d_hidden, d_head_chunk = product_transposed(d_logits(table, first), hidden_chunk, table)
            return d_head + d_head_chunk, d_hidden
        # A product whose left operand has its summed axis first is six times as slow in bfloat16 (XLA on CPUs).
        transposed = lax.optimization_barrier(hidden_chunk.T)

        def block(d_hidden, block):
            table, first, d_table = block
            cotangent = lax.optimization_barrier(narrowed(d_logits(table, first), hidden.dtype))
            return d_hidden + dot(cotangent, table, (1, 0)), d_table + dot(transposed, cotangent, (1, 0))

        zeros = jnp.zeros_like(hidden_chunk, dtype=full.dtype)
        d_hidden, d_head = lax.scan(block, zeros, (*tables, d_head))
        return d_head, d_hidden.astype(hidden.dtype)

    d_logprobs, d_nats = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    if d_logprobs is None:
        d_logprobs = jnp.zeros_like(full)
    arrays = (hidden, targets, support, full, kept, nats, d_logprobs, d_nats)
    zeros = jnp.zeros_like(head, dtype=full.dtype)
    if options.vocab_blocks > 1:  # [blocks, d, v / blocks]
        zeros = _table_blocks(options, zeros)[0].swapaxes(1, 2)
    counted = count if options.counted else None
    d_head, d_hidden = scan_chunks(chunk, zeros, arrays, options.chunk_size, counted)
    if options.vocab_blocks > 1:
        d_head = d_head.swapaxes(1, 2).reshape(head.shape)
    return d_hidden, d_head.astype(head.dtype), None, jnp.zeros_like(support), None


# Who asks for entropy only to look at it does not pay for its derivative.
_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)
