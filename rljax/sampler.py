"""Prompts to a Rollout in one compiled program: prefill, then a loop of decode steps against a cache."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rljax.compiles import named
from rljax.decoding import Sampling, draw, request_key
from rljax.models.attention import cached_attend, visibility
from rljax.models.decoder import Model, Params, by_layer, empty_cache, forward, row_positions, vocabulary_logits
from rljax.models.layers import wide_dtype
from rljax.models.params import param_shardings, quantized, quantized_shardings
from rljax.models.quantized import cast
from rljax.refill import decode_with_refill, step_counts
from rljax.refill_plan import RefillPlan
from rljax.sharding import BATCH_AXES, Layout
from rljax.types import FINISH_END, FINISH_LENGTH, Prompts, Rollout

Generate = Callable[[Any, Prompts, PRNGKeyArray, Int[Array, ""]], Rollout]


class DecodeState(NamedTuple):
    """The loop's carry on one data shard."""

    step: Int[Array, ""]
    tokens: Int[Array, "b t"]
    logprobs: Float[Array, "b t"]
    support: Float[Array, "b t"]
    sampled: Bool[Array, "b t"]
    running: Bool[Array, " b"]
    finished: Bool[Array, " b"]  # an end token was sampled
    hidden: tuple[Float[Array, "b d"], ...]  # predicts the next token; of every model that has a say
    caches: tuple[Any, ...]


def make_generate(
    model: Model,
    train: Layout,
    decode: Layout,
    sampling: Sampling,
    *,
    dtype: Any,
    refill: RefillPlan | None = None,
    mixture: float | None = None,
    weights_dtype: str = "compute",
    cache_dtype: str = "compute",
    name: str = "rollout",
) -> Generate:
    """``generate(params, prompts, key, step_version) -> Rollout``, compiled once for each shape of ``prompts``.

    Without ``refill`` it is the plain path: a fixed batch, as long as its longest row. With it slots take up new
    requests as answers end, and ``prompts`` come in groups that share one prompt.

    Parameters arrive laid out for training, on ``train``'s mesh; inside they are cast to ``dtype`` once and laid out on
    ``decode``'s mesh, another factorisation of the same devices. Data shards decode on their own, each until its last
    row has ended; rows come back in the training layout. ``key`` is folded with each row's prompt_id and sample_id.
    With ``mixture`` m in (0, 1), parameters are a pair and tokens come from ``π_1^{1-m} π_2^m``, renormalised.
    ``weights_dtype`` int8 rounds the layers' weights, once, with a scale an output channel; ``cache_dtype`` int8 keys
    and values, with a scale for each token's every head. Log-probs are those of what sampled: of the rounded policy.
    ``name`` is of PROGRAMS (``rljax/compiles.py``).
    """
    rows = PartitionSpec(BATCH_AXES)
    shares = (1.0,) if mixture is None else (1 - mixture, mixture)
    shardings = quantized_shardings if weights_dtype == "int8" else param_shardings
    places = [shardings(model, layout) for layout in (train, decode)]

    def laid_out(params: Params) -> Params:
        # Cast or rounded where they lie, so that what travels to the decode mesh is small.
        weights = cast(quantized(model, params) if weights_dtype == "int8" else params, dtype)
        for place in places:
            weights = jax.lax.with_sharding_constraint(weights, place)
        return {**weights, "layers": by_layer(weights["layers"])} if decode.on_cpu else weights

    def generate(params: Any, prompts: Prompts, key: PRNGKeyArray, step_version: Array) -> Rollout:
        weights: Any = tuple(laid_out(tree) for tree in (params if mixture is not None else (params,)))
        prompts = jax.lax.with_sharding_constraint(prompts, decode.rows)
        held = jnp.int8 if cache_dtype == "int8" else dtype
        decode_rows = partial(decode_batch, model, decode, sampling, dtype, held, shares)
        if refill is not None and mixture is None:
            if decode.on_cpu and held == dtype:
                held = wide_dtype(dtype)  # no batched product of bfloat16: each step would convert it all
            weights = weights[0]
            decode_rows = partial(decode_with_refill, model, decode, sampling, dtype, held, refill)
        shard = jax.shard_map(
            decode_rows,
            mesh=decode.mesh,
            in_specs=(PartitionSpec(), rows, PartitionSpec()),
            out_specs=rows,
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )
        rollout = _as_rollout(prompts, step_version, *shard(weights, prompts, key))
        return jax.lax.with_sharding_constraint(rollout, train.rows)

    return jax.jit(named(name, generate))


def _as_rollout(
    prompts: Prompts,
    step_version: Int[Array, ""],
    tokens: Int[Array, "b t"],
    logprobs: Float[Array, "b t"],
    support: Float[Array, "b t"],
    sampled: Bool[Array, "b t"],
    finished: Bool[Array, " b"],
    decode_steps: Array,
    slot_steps: Array,
) -> Rollout:
    """What either way of decoding gives."""
    budget = tokens.shape[1] - prompts.tokens.shape[1]
    return Rollout(
        tokens=tokens,
        valid=sampled | jnp.pad(prompts.valid, ((0, 0), (0, budget))),
        loss_mask=sampled,
        behavior_logprobs=logprobs,
        support=support,
        finish_reason=jnp.where(finished, FINISH_END, FINISH_LENGTH),
        prompt_id=prompts.prompt_id,
        sample_id=prompts.sample_id,
        group_id=prompts.prompt_id,
        step_version=jnp.full_like(prompts.prompt_id, step_version),
        decode_steps=decode_steps,
        slot_steps=slot_steps,
    )


def decode_batch(
    model: Model,
    layout: Layout,
    sampling: Sampling,
    dtype: Any,
    cache_dtype: Any,
    shares: tuple[float, ...],
    params: tuple[Params, ...],
    prompts: Prompts,
    key: PRNGKeyArray,
) -> tuple[Array, ...]:
    """The plain path: a fixed batch, one column of the cache a step, until every row has ended."""
    b, p = prompts.tokens.shape
    budget = sampling.max_new_tokens
    keys = jax.vmap(partial(request_key, key))(prompts.prompt_id, prompts.sample_id)
    positions = row_positions(prompts.valid)
    segments = prompts.valid.astype(jnp.int32)
    lengths = jnp.sum(segments, axis=-1)
    end_ids = jnp.asarray(sampling.end_ids, jnp.int32)
    greedy = prompts.sample_id < sampling.greedy_samples if sampling.greedy_samples else None
    budgets = budget if prompts.max_new_tokens is None else prompts.max_new_tokens
    read = partial(_read, model, layout, params, dtype)
    seen = partial(visibility, window=model.config.sliding_window)
    caches = tuple(_new_cache(model, layout, b, p + budget, cache_dtype) for _ in shares)
    first, caches = read(prompts.tokens, positions, 0, seen(positions, positions, segments, segments), caches)
    key_positions = jnp.concatenate([positions, lengths[:, None] + jnp.arange(budget)], axis=1)

    def step(s: DecodeState) -> DecodeState:
        token_keys = jax.vmap(lambda k: jax.random.fold_in(k, s.step))(keys)
        said = [vocabulary_logits(model, tree, h) for tree, h in zip(params, s.hidden, strict=True)]
        mixed = said[0] if len(said) == 1 else shares[0] * said[0] + shares[1] * said[1]
        token, logprob, support = draw(token_keys, mixed, sampling, greedy)
        ended = jnp.any(token[:, None] == end_ids, axis=-1)

        def write(column: Array, value: Array, empty: Any) -> Array:
            value = jnp.where(s.running, value.astype(column.dtype), empty)
            return jax.lax.dynamic_update_slice(column, value[:, None], (jnp.int32(0), p + s.step))

        position = lengths + s.step
        columns = jnp.arange(p + budget)
        written = jnp.concatenate([segments, jnp.ones((b, budget), jnp.int32)], axis=1) * (columns <= p + s.step)
        visible = seen(position[:, None], key_positions, jnp.ones((b, 1), jnp.int32), written)
        hidden, caches = read(token[:, None], position[:, None], p + s.step, visible, s.caches)
        return DecodeState(
            step=s.step + 1,
            tokens=write(s.tokens, token, 0),
            logprobs=write(s.logprobs, logprob, 0.0),
            support=write(s.support, support, -jnp.inf),
            sampled=write(s.sampled, s.running, False),
            running=s.running & ~ended & (s.step + 1 < budgets),
            finished=s.finished | (s.running & ended),
            hidden=hidden,
            caches=caches,
        )

    start = _start(prompts, budget, wide_dtype(dtype), first, caches)
    end = jax.lax.while_loop(lambda s: (s.step < budget) & jnp.any(s.running), step, start)
    return end.tokens, end.logprobs, end.support, end.sampled, end.finished, *step_counts(b, end.step, end.step * b)


def _start(prompts: Prompts, budget: int, wide: Any, hidden: tuple[Array, ...], caches: tuple[Any, ...]) -> DecodeState:
    """Prompts that have been read, and room for ``budget`` tokens."""
    b, p = prompts.tokens.shape
    return DecodeState(
        step=jnp.int32(0),
        tokens=jnp.pad(prompts.tokens, ((0, 0), (0, budget))),
        logprobs=jnp.zeros((b, p + budget), wide),
        support=jnp.full((b, p + budget), -jnp.inf, wide),
        sampled=jnp.zeros((b, p + budget), bool),
        running=jnp.any(prompts.valid, axis=-1),  # a row without a prompt fills up the batch
        finished=jnp.zeros(b, bool),
        hidden=hidden,
        caches=caches,
    )


def _new_cache(model: Model, layout: Layout, rows: int, columns: int, dtype: Any) -> Any:
    cache = empty_cache(model, layout, rows, columns, dtype)
    return by_layer(cache) if layout.on_cpu else cache


def _read(
    model: Model,
    layout: Layout,
    params: tuple[Params, ...],
    dtype: Any,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    column: Any,
    visible: Array,
    caches: tuple[Any, ...],
) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    """Every model's last hidden state behind ``tokens``, and its cache with them from ``column`` on."""
    attend = cached_attend(column, visible, layout, model.config.attention_scale)
    found = [
        forward(model, layout, tree, tokens, positions, attend, cache, dtype=dtype)
        for tree, cache in zip(params, caches, strict=True)
    ]
    return tuple(hidden[:, -1] for hidden, _ in found), tuple(cache for _, cache in found)
