"""The carry of the refill loop, and what it closes over."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rljax.decoding import Sampling
from rljax.models.decoder import Model, Params
from rljax.refill_plan import RefillPlan
from rljax.sharding import Layout
from rljax.types import Prompts


class Slots(NamedTuple):
    """What each slot is at."""

    request: Int[Array, " s"]
    entry: Int[Array, " s"]  # where its prompt lies
    age: Int[Array, " s"]  # tokens of its completion so far
    running: Bool[Array, " s"]
    hidden: Float[Array, "s d"]  # predicts its next token
    cache: Any  # the ring: a Cache [L, S, K, C, H], or on CPUs a list of them without L (``by_layer``)


class Entries(NamedTuple):
    """Prompts at hand."""

    prompt: Int[Array, " q"]  # its number in the queue
    open: Int[Array, " q"]  # samples of it that have not ended; an entry with none is free
    valid: Bool[Array, "q p"]
    hidden: Float[Array, "q d"]  # predicts the first token of a completion
    cache: Any  # likewise: [L, Q, K, P, H], or [L, K, Q, P, H] where prompts are shared


class Filling(NamedTuple):
    """Prompts that are being prefilled in chunks."""

    at: Int[Array, " n"]  # their entries, which are free until the last chunk
    column: Int[Array, ""]  # that the next chunk begins at; the width of prompts: there are none


class AtHand(NamedTuple):
    """What prefilling changes. The ring is no part of it: XLA copies what a loop inside the loop carries."""

    prefilled: Int[Array, ""]  # prompts that have had an entry
    entries: Entries
    filling: Filling


class Written(NamedTuple):
    """Whole rows in the order of the requests, prompts on the left: what the program returns, so no copy is made."""

    tokens: Int[Array, "r t"]
    logprobs: Float[Array, "r t"]
    support: Float[Array, "r t"]
    lengths: Int[Array, " r"]
    finished: Bool[Array, " r"]


class Loop(NamedTuple):
    step: Int[Array, ""]
    admitted: Int[Array, ""]  # requests that have had a slot
    prefilled: Int[Array, ""]  # prompts that have had an entry
    slot_steps: Int[Array, ""]  # slots times steps so far
    busy: Bool[Array, ""]  # there is something left to do, here or on a shard that goes in step
    slots: Slots
    entries: Entries
    filling: Filling
    written: Written


class Refill(NamedTuple):
    """What the loop closes over: static settings, then this shard's inputs."""

    model: Model
    layout: Layout
    sampling: Sampling
    dtype: Any
    cache_dtype: Any
    plan: RefillPlan
    params: Params
    prompts: Prompts  # one row a request
    key: PRNGKeyArray

    @property
    def budget(self) -> int:
        return self.sampling.max_new_tokens

    def budgets(self, request: Int[Array, " s"]) -> Array | int:
        """Tokens of these requests' completions at most."""
        own = self.prompts.max_new_tokens
        return self.budget if own is None else jnp.minimum(own[request], self.budget)

    @property
    def requests(self) -> int:
        return self.prompts.tokens.shape[0]

    @property
    def width(self) -> int:
        return self.prompts.tokens.shape[1]

    @property
    def chunk(self) -> int:
        """Columns that are prefilled at once."""
        return min(self.plan.prefill_chunk or self.width, self.width)

    @property
    def groups(self) -> int:
        return self.requests // self.plan.group
