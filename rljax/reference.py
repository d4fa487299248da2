"""References: log-probs cached over a whole dataset and looked up by row; a reference that follows its policy."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from rljax.data.batches import DataPosition
from rljax.models.decoder import Params
from rljax.sharding import Layout, agree, gather, to_global


class CachedLogprobs(NamedTuple):
    """Of the completions' tokens only, one row behind the other."""

    row_ids: Int[np.ndarray, " n"]  # sorted
    starts: Int[np.ndarray, " n+1"]  # of each row in ``values``, and where the last one ends
    values: Float[np.ndarray, " tokens"]

    def of(self, row_id: Int[np.ndarray, " b"], loss_mask: Bool[np.ndarray, "b t"]) -> Float[np.ndarray, "b t"]:
        """The rows' log-probs where ``loss_mask`` says, zeros elsewhere."""
        logprobs = np.zeros(loss_mask.shape, self.values.dtype)
        found = np.searchsorted(self.row_ids, row_id)
        for row, (at, mask) in enumerate(zip(found, loss_mask, strict=True)):
            if mask.any():
                logprobs[row, mask] = self.values[self.starts[at] : self.starts[at + 1]]
        return logprobs


def cache_logprobs(score: Callable[..., Any], params: Any, source: Any, rows: int, layout: Layout) -> CachedLogprobs:
    """``score(params, batch)`` of every row of ``source``, ``rows`` sequences a call."""
    found: dict[int, np.ndarray] = {}
    position, units = DataPosition(), rows // source.unit
    for _ in range(-(-len(source) // units)):
        _, batch, position = source.take(position, units)
        host = {"tokens": batch.tokens, "valid": batch.valid, "loss_mask": batch.loss_mask}
        placed = {name: to_global(array, layout.rows) for name, array in host.items()}
        logprobs = gather(score(params, placed))
        for row_id, row, mask in zip(batch.row_id.tolist(), logprobs, batch.loss_mask, strict=True):
            found.setdefault(row_id, row[mask])
    row_ids = np.array(sorted(found), np.int64)
    kept = [found[row_id] for row_id in row_ids.tolist()]
    return CachedLogprobs(row_ids, np.cumsum([0, *map(len, kept)]), np.concatenate(kept))


def save_cache(file: epath.Path, cache: CachedLogprobs) -> None:
    """Whole or not at all; by the first process."""
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        with part.open("wb") as opened:
            np.savez(opened, **cache._asdict())
        part.rename(file)


def load_cache(file: epath.Path) -> CachedLogprobs | None:
    """None where not every process finds it."""
    if not agree(np.asarray(file.exists()), np.min):
        return None
    with file.open("rb") as opened, np.load(opened) as arrays:
        return CachedLogprobs(*(arrays[name] for name in CachedLogprobs._fields))


@partial(jax.jit, donate_argnums=0, static_argnums=2)
def moved_mean(mean: Params, params: Params, decay: float) -> Params:
    """``decay`` of the running mean and the rest of ``params``."""
    return jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, mean, params)
