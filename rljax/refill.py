"""The fast rollout: a queue of requests, slots that refill inside the loop, and shared prompts, in one program.

A data shard has R requests (prompts x group) and S slots. A slot whose answer ended takes the next request inside the
loop. A prompt is prefilled once into one of Q entries, where all samples of its group read it; an entry whose samples
have all ended takes the next prompt. Completions lie in a ring: every slot writes at one cursor, so a step's cache
write is a single slice, and a slot's age says which columns are its own. Memory does not depend on R.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rljax.decoding import Sampling, draw, request_key
from rljax.models.attention import Cache
from rljax.models.decoder import Model, Params, by_layer, empty_cache, vocabulary_logits
from rljax.models.layers import wide_dtype
from rljax.prefill import entry_cache, prefill
from rljax.refill_plan import RefillPlan, starts_with_half
from rljax.refill_read import read_tokens
from rljax.refill_state import AtHand, Entries, Filling, Loop, Refill, Slots, Written
from rljax.sharding import BATCH_AXES, Layout
from rljax.types import Prompts

SHRINK_FACTOR = 4  # how much smaller each further loop is
SMALLEST_LOOP = 4  # slots; a loop of its own is not worth its compilation below


def decode_with_refill(
    model: Model,
    layout: Layout,
    sampling: Sampling,
    dtype: Any,
    cache_dtype: Any,
    plan: RefillPlan,
    params: Params,
    prompts: Prompts,
    key: PRNGKeyArray,
) -> tuple[Array, ...]:
    """One data shard's requests, in groups: as ``sampler.decode_batch``, in their order."""
    rows = prompts.tokens.shape[0]
    if rows % plan.group:
        raise ValueError(f"a data shard has {rows} requests, which are not whole groups of {plan.group}")
    plan = replace(plan, slots=min(plan.slots, rows))
    r = Refill(model, layout, sampling, dtype, cache_dtype, plan, params, prompts, key)
    if r.width % r.chunk:
        raise ValueError(f"prompts of {r.width} columns are not whole chunks of {r.chunk}")
    loops = _loops(r)
    state = _start(r, loops[0].columns)
    for before, loop in zip((loops[0], *loops), loops, strict=False):
        state = _shrunk(r, state, loop.slots) if loop.slots < before.slots else state
        state = _with_whole_ring(r, state) if loop.columns > before.columns else state
        state = state._replace(busy=_busy(r, loop, state))
        state = jax.lax.while_loop(lambda s: s.busy, partial(_step, r, loop), state)
    w = state.written
    sampled = jnp.arange(-r.width, r.budget)[None] < w.lengths[:, None]
    sampled &= jnp.arange(r.width + r.budget) >= r.width
    return w.tokens, w.logprobs, w.support, sampled, w.finished, *step_counts(rows, state.step, state.slot_steps)


class _Stretch(NamedTuple):
    """One loop of several: it goes on until its columns are full or no more slots run than the next one has."""

    slots: int
    columns: int  # of the ring
    next_slots: int


def _loops(r: Refill) -> list[_Stretch]:
    slots = [r.plan.slots]
    while len(slots) < r.plan.loops and slots[-1] >= SHRINK_FACTOR * SMALLEST_LOOP:
        slots.append(slots[-1] // SHRINK_FACTOR)
    loops = [_Stretch(size, r.budget, left) for size, left in zip(slots, (*slots[1:], 0), strict=True)]
    if starts_with_half(r.layout, r.budget):
        loops.insert(0, loops[0]._replace(columns=r.budget // 2))
    return loops


def step_counts(rows: int, steps: Array, slot_steps: Array) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """A shard's counts as two of ``Rollout``'s columns."""
    return jnp.full(rows, steps, jnp.int32), jnp.full(rows, slot_steps / rows, jnp.float32)


def _start(r: Refill, ring: int) -> Loop:
    """Empty slots with the first ``ring`` columns of their ring, no prompt at hand, nothing written."""
    width, slots, entries = r.model.config.width, r.plan.slots, r.plan.entries(r.groups)
    row = (r.requests, r.width + r.budget)
    return Loop(
        step=jnp.int32(0),
        admitted=jnp.int32(0),
        prefilled=jnp.int32(0),
        slot_steps=jnp.int32(0),
        busy=jnp.bool_(True),
        slots=Slots(
            request=jnp.zeros(slots, jnp.int32),
            entry=jnp.zeros(slots, jnp.int32),
            age=jnp.zeros(slots, jnp.int32),
            running=jnp.zeros(slots, bool),
            hidden=jnp.zeros((slots, width), r.dtype),
            cache=_stacks(r, empty_cache(r.model, r.layout, slots, ring, r.cache_dtype)),
        ),
        entries=Entries(
            prompt=jnp.zeros(entries, jnp.int32),
            open=jnp.zeros(entries, jnp.int32),
            valid=jnp.zeros((entries, r.width), bool),
            hidden=jnp.zeros((entries, width), r.dtype),
            cache=entry_cache(r.model, r.layout, entries, r.width, r.cache_dtype, shared=r.plan.group > 1),
        ),
        filling=Filling(jnp.zeros(r.plan.prefilled(r.groups), jnp.int32), jnp.int32(r.width)),
        written=Written(
            tokens=jnp.pad(r.prompts.tokens, ((0, 0), (0, r.budget))),
            logprobs=jnp.zeros(row, wide_dtype(r.dtype)),
            support=jnp.full(row, -jnp.inf, wide_dtype(r.dtype)),
            lengths=jnp.zeros(r.requests, jnp.int32),
            finished=jnp.zeros(r.requests, bool),
        ),
    )


def _with_whole_ring(r: Refill, s: Loop) -> Loop:
    """The first columns as they are, the others empty."""

    def begins(whole: Array, half: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, half, (jnp.int32(0),) * whole.ndim)

    whole = _stacks(r, empty_cache(r.model, r.layout, r.plan.slots, r.budget, r.cache_dtype))
    return s._replace(slots=s.slots._replace(cache=jax.tree.map(begins, whole, s.slots.cache)))


def _busy(r: Refill, loop: _Stretch, s: Loop) -> Array:
    """More to do in this loop: requests that wait, or more running slots than the next loop has."""
    mine = (s.admitted < r.requests) | (jnp.sum(s.slots.running) > loop.next_slots)
    mine = jax.lax.psum(mine.astype(jnp.int32), BATCH_AXES) > 0 if r.plan.uniform_steps else mine
    return mine if loop.columns == r.budget else mine & (s.step < loop.columns)


def _step(r: Refill, loop: _Stretch, s: Loop) -> Loop:
    """Free slots take requests; every slot samples a token and reads it."""
    if loop.slots == r.plan.slots:
        at_hand = _prefilled(r, AtHand(s.prefilled, s.entries, s.filling))
        s = _admitted(r, s._replace(**at_hand._asdict()))
    slots, cursor = s.slots, s.step % r.budget
    sample_id = r.prompts.sample_id[slots.request]
    keys = jax.vmap(partial(request_key, r.key))(r.prompts.prompt_id[slots.request], sample_id)
    keys = jax.vmap(jax.random.fold_in)(keys, slots.age)
    scores = vocabulary_logits(r.model, r.params, slots.hidden)
    greedy = sample_id < r.sampling.greedy_samples if r.sampling.greedy_samples else None
    token, logprob, support = draw(keys, scores, r.sampling, greedy)
    ended = jnp.any(token[:, None] == jnp.asarray(r.sampling.end_ids, jnp.int32), axis=-1)
    at = jnp.where(slots.running, slots.request, r.requests)  # out of bounds: not written
    put = partial(_put, at, r.width + slots.age)
    w = s.written
    written = Written(
        tokens=put(w.tokens, token),
        logprobs=put(w.logprobs, logprob),
        support=put(w.support, support),
        lengths=w.lengths.at[at].set(slots.age + 1, mode="drop"),
        finished=w.finished.at[at].set(ended, mode="drop"),
    )
    done = slots.running & (ended | (slots.age + 1 >= r.budgets(slots.request)))
    hidden, cache = read_tokens(r, s, token, cursor, loop.columns)
    after = Slots(
        request=slots.request,
        entry=slots.entry,
        age=slots.age + 1,
        running=slots.running & ~done,
        hidden=hidden,
        cache=cache,
    )
    s = s._replace(
        step=s.step + 1,
        slot_steps=s.slot_steps + slots.age.shape[0],
        slots=after,
        entries=s.entries._replace(open=s.entries.open - _per_entry(s, done)),
        written=written,
    )
    return s._replace(busy=_busy(r, loop, s))


def _put(rows: Array, columns: Array, values: Array, new: Array) -> Array:
    return values.at[rows, columns].set(new.astype(values.dtype), mode="drop")


def _per_entry(s: Loop, counted: Bool[Array, " s"]) -> Int[Array, " q"]:
    """How many of the counted slots read each entry."""
    mine = s.slots.entry[:, None] == jnp.arange(s.entries.open.shape[0])
    return jnp.sum(mine & counted[:, None], axis=0, dtype=jnp.int32)


def _prefilled(r: Refill, s: AtHand) -> AtHand:
    """Prompts into free entries, as many as there is room for; in chunks one chunk, or more where no slot is busy."""
    if r.chunk == r.width:
        return jax.lax.while_loop(partial(_can_prefill, r), partial(_prefill_next, r), s)

    def goes_on(carry: tuple[AtHand, Array]) -> Array:
        s, first = carry
        return _can_prefill(r, s) & (first | ~jnp.any(s.entries.open > 0))

    def chunk(carry: tuple[AtHand, Array]) -> tuple[AtHand, Array]:
        return _prefill_next(r, carry[0]), jnp.bool_(False)

    return jax.lax.while_loop(goes_on, chunk, (s, jnp.bool_(True)))[0]


def _can_prefill(r: Refill, s: AtHand) -> Array:
    waiting = r.groups - s.prefilled
    return (waiting > 0) & (jnp.sum(s.entries.open == 0) >= jnp.minimum(waiting, r.plan.prefilled(r.groups)))


def _prefill_next(r: Refill, s: AtHand) -> AtHand:
    """The next prompts of the queue into free entries, or the next chunk of them: entries open with the last one."""
    at = jnp.argsort(s.entries.open, stable=True)[: r.plan.prefilled(r.groups)].astype(jnp.int32)
    number = s.prefilled + jnp.arange(at.shape[0], dtype=jnp.int32)
    there = number < r.groups
    prompts = jax.tree.map(lambda x: x[jnp.where(there, number * r.plan.group, 0)], r.prompts)
    settings = (r.model, r.layout, r.params, r.dtype, s.entries.cache, prompts)
    filling, last = s.filling, there
    if r.chunk == r.width:
        hidden, cache = prefill(*settings, at, there, shared=r.plan.group > 1)
    else:
        begins = filling.column == r.width
        at = jnp.where(begins, at, filling.at)
        first = jnp.argmax(jnp.any(prompts.valid & there[:, None], axis=0)).astype(jnp.int32)  # none before is a token
        start = jnp.where(begins, first // r.chunk * r.chunk, filling.column)
        hidden, cache = prefill(*settings, at, there, shared=r.plan.group > 1, start=start, chunk=r.chunk)
        filling = Filling(at, start + r.chunk)
        last = there & (filling.column == r.width)
    places = jnp.where(last, at, s.entries.open.shape[0])  # out of bounds: not written

    def put(old: Array, new: Array) -> Array:
        return old.at[places].set(new, mode="drop")

    entries = Entries(
        prompt=put(s.entries.prompt, number),
        open=put(s.entries.open, jnp.full_like(number, r.plan.group)),
        valid=put(s.entries.valid, prompts.valid),
        hidden=put(s.entries.hidden, hidden),
        cache=cache,
    )
    return AtHand(s.prefilled + jnp.sum(last, dtype=jnp.int32), entries, filling)


def _admitted(r: Refill, s: Loop) -> Loop:
    """Requests, in the order of the queue, into the slots that are free, as far as their prompts are at hand.

    A request without a prompt fills up the batch: it is over as soon as it is admitted.
    """
    slots, entries = s.slots, s.entries
    if r.plan.group == 1:  # entry i is slot i's own
        request, entry = entries.prompt, jnp.arange(slots.age.shape[0], dtype=jnp.int32)
        admit = ~slots.running & (entries.open > 0)
    else:
        free = ~slots.running
        request = s.admitted + jnp.cumsum(free, dtype=jnp.int32) - 1
        admit = free & (request < jnp.minimum(s.prefilled * r.plan.group, r.requests))
        found = (request // r.plan.group)[:, None] == entries.prompt
        entry = jnp.argmax(found & (entries.open > 0), axis=1).astype(jnp.int32)
    starts = admit & jnp.any(entries.valid, axis=1)[entry]
    slots = slots._replace(
        request=jnp.where(admit, request, slots.request),
        entry=jnp.where(admit, entry, slots.entry),
        age=jnp.where(admit, 0, slots.age),
        running=slots.running | starts,
        hidden=jnp.where(admit[:, None], entries.hidden[entry], slots.hidden),
    )
    s = s._replace(slots=slots, admitted=s.admitted + jnp.sum(admit, dtype=jnp.int32))
    return s._replace(entries=entries._replace(open=entries.open - _per_entry(s, admit & ~starts)))


def _shrunk(r: Refill, s: Loop, size: int) -> Loop:
    """The running slots and a few more, ``size`` in all."""
    kept = jnp.argsort(~s.slots.running, stable=True)[:size]
    slots = _taken(s.slots, kept)
    if r.plan.group > 1:
        return s._replace(slots=slots)
    entries = _taken(s.entries, kept)
    return s._replace(slots=slots._replace(entry=jnp.arange(size, dtype=jnp.int32)), entries=entries)


def _taken(of: Any, kept: Array) -> Any:
    """Slots or entries by number."""
    cache = jax.tree.map(lambda x: x[kept] if isinstance(of.cache, list) else x[:, kept], of.cache)
    return jax.tree.map(lambda x: x[kept], of._replace(cache=()))._replace(cache=cache)


def _stacks(r: Refill, cache: Cache) -> Any:
    return by_layer(cache) if r.layout.on_cpu else cache
