"""Tables of numbers as batches, and an algorithm's loss of them as the trainer takes it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.algos.base import Algorithm, Batch, total
from rljax.losses.masked import count_tokens
from rljax.types import Outputs


def table(rows: list[list[float]], fill: float = np.nan) -> np.ndarray:
    """Rows of unequal length behind one prompt column, filled up with what nothing may read."""
    width = max(map(len, rows)) + 1
    return np.array([[fill, *row, *[fill] * (width - 1 - len(row))] for row in rows], np.float64)


def mask_of(rows: list[list[float]]) -> np.ndarray:
    return ~np.isnan(table(rows))


def terms_of(algorithm: Algorithm, outputs: Outputs, batch: Batch, state: Any = (), pieces: int = 1) -> dict[str, Any]:
    """Every term over its denominator, summed over micro-batches of whole units, and "total", what is differentiated.

    ``outputs`` has a row for each that ``prepare`` leaves.
    """
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    _, batch, denominators = algorithm.prepare(state, batch, jax.random.key(0))
    denominators = {"tokens": count_tokens(batch["loss_mask"]), **denominators}
    denominators = {name: jnp.maximum(value, 1) for name, value in denominators.items()}
    size = batch["loss_mask"].shape[0] // pieces
    sums: dict[str, Any] = {}
    for start in range(0, size * pieces, size):
        cut = jax.tree.map(lambda x, start=start: x[start : start + size], (outputs, batch))
        terms = algorithm.loss(*cut)
        values = {name: term.numerator / denominators[term.denominator] for name, term in terms.items()}
        values["total"] = total(terms, denominators)
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
    return sums
