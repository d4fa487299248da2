"""The door of an algorithm: pure functions of arrays in a NamedTuple. It knows no model, mesh or tokenizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.types import Experience, Outputs, Term

# Arrays of one leading row axis; ``tokens``, ``valid`` and ``loss_mask`` are always among them.
Batch = dict[str, Array]


class Algorithm(NamedTuple):
    """``targets`` and ``loss`` are the core; the trainer does the rest.

    needs: what the trainer computes once per rollout or asks of a head pass: "ref_logprobs", "proximal_logprobs",
        "entropy".
    init: the algorithm's own state, part of the checkpoint; () where it has none.
    targets: once on the whole global rollout. Offline algorithms have none: their rows are batches as they are.
    prepare: once per optimizer step on the whole minibatch, before the cut into micro-batches: any statistic that
        crosses rows, and the denominators that the terms name.
    loss: a micro-batch's terms; those with coefficient 0 are metrics.
    """

    needs: frozenset[str]
    init: Callable[[], Any]
    targets: Callable[[Any, Experience], tuple[Any, Batch]] | None
    prepare: Callable[[Batch], tuple[Batch, dict[str, Float[Array, ""]]]]
    loss: Callable[[Outputs, Batch], dict[str, Term]]


def no_state() -> tuple[()]:
    return ()


def total(terms: dict[str, Term], denominators: dict[str, Float[Array, ""]]) -> Float[Array, ""]:
    """The scalar that is differentiated: terms with a coefficient, each over its whole step's denominator."""
    return sum((t.coef * t.numerator / denominators[t.denominator] for t in terms.values() if t.coef), jnp.float32(0))
