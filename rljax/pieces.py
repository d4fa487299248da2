"""Rollouts in pieces: the devices sample one piece while the hosts decode and reward the one before."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Int

from rljax.sampler import Generate
from rljax.sharding import gather, to_global
from rljax.types import Prompts, PyTree, Rollout

Read = TypeVar("Read")


class Writer(NamedTuple):
    """Who writes which rows of a step."""

    generate: Generate
    params: PyTree
    rows: Bool[np.ndarray, " b"]


class Written(NamedTuple):
    """What one call of a rollout program wrote."""

    rows: Int[np.ndarray, " n"]  # their numbers among the rows of the step
    rollout: Rollout  # global arrays
    host: Any  # the same as NumPy arrays


class Times(NamedTuple):
    """Seconds of sampling and rewards."""

    rollout: float  # until the last completion was on the hosts
    reward: float  # from then until the last one had been read
    host_idle: float  # of both together, without a completion to read
    device_idle: float  # of both together, without a rollout program


def cut_pieces(rows: int, pieces: int, shards: int) -> Int[np.ndarray, "pieces n"]:
    """The rows of each piece: an equal run of neighbours from every data shard's share, so that groups stay whole."""
    return np.arange(rows).reshape(shards, pieces, -1).swapaxes(0, 1).reshape(pieces, -1)


def write(
    writers: Sequence[Writer],
    prompts: Prompts,
    key: Any,
    version: Any,
    layout: NamedSharding,
    piece: Int[np.ndarray, " n"],
) -> list[Written]:
    """The completions of a piece, whole on every host. ``prompts`` are those of the step, on the host."""
    written = []
    for writer in writers:
        rows = piece[writer.rows[piece]]
        placed = jax.tree.map(lambda leaf, rows=rows: to_global(np.asarray(leaf)[rows], layout), prompts)
        rollout = jax.block_until_ready(writer.generate(writer.params, placed, key, version))
        written.append(Written(rows, rollout, gather(rollout)))
    return written


def overlapped(
    write: Callable[[np.ndarray], list[Written]], read: Callable[[list[Written]], Read], pieces: Int[np.ndarray, "p n"]
) -> tuple[list[Written], list[Read], Times]:
    """``write`` of every piece in turn, and ``read`` of each on another thread while the next one is written."""

    def timed(run: Callable[..., Any], *args: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        return run(*args), time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(1) as reader:
        written: list[Written] = []
        busy, reading = 0.0, []
        for piece in pieces:
            found, seconds = timed(write, piece)
            busy += seconds
            written += found
            reading.append(reader.submit(timed, read, found))
        middle = time.perf_counter()
        reads = [each.result() for each in reading]
    end = time.perf_counter()
    times = Times(
        rollout=middle - start,
        reward=end - middle,
        host_idle=end - start - sum(seconds for _, seconds in reads),
        device_idle=end - start - busy,
    )
    return written, [value for value, _ in reads], times


def joined(written: Sequence[Written], layout: NamedSharding) -> tuple[Rollout, Any]:
    """The rows of a step in their order, as global and as NumPy arrays; steps are those of all programs together."""
    if len(written) == 1:
        return written[0].rollout, written[0].host
    rows = np.argsort(np.concatenate([each.rows for each in written]))
    host = jax.tree.map(lambda *parts: np.concatenate(parts)[rows], *(each.host for each in written))
    if host.decode_steps is not None:
        steps = sum(each.host.decode_steps for each in written)
        host = host._replace(decode_steps=np.concatenate([steps] * len(written))[rows])
    return jax.tree.map(lambda x: to_global(x, layout), host), host
