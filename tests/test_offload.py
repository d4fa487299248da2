"""Moments and reference in the hosts' memory: the same numbers, where they are said to be, also from a checkpoint.

A CPU's devices know that memory too, so the programs run here; a config that asks for it on CPUs is refused.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rljax.checkpoint import Checkpointer
from rljax.config import ConfigError
from rljax.sharding import HOST_MEMORY, to_global
from rljax.stage_state import abstract_saved, saved
from rljax.stages import Stage
from tests.truths import digit_share, main_stage, random_batch, tiny_session

HEAD_FROM, BUDGET = 8, 8


def open_stage(offloads: bool) -> Stage:
    session = tiny_session("1,2,1", **{"batch.minibatches": 2})
    config = replace(session.config, offload_optimizer=offloads, offload_reference=offloads)
    return main_stage(replace(session, config=config), digit_share)


def run(stage: Stage) -> tuple[Any, Any, Any]:
    """An update of two optimizer steps, its metrics, and the reference's log-probs."""
    session = stage.session
    lengths = [(1 + i % 8, 1 + (3 * i) % 8) for i in range(16)]
    host = random_batch(np.random.default_rng(0), session.tokenizer.vocab_size, lengths, HEAD_FROM, BUDGET)
    host = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in host.items()}
    batch = {name: to_global(x, session.train.rows) for name, x in host.items()}
    scored = stage.program("score_reference", HEAD_FROM)(
        stage.reference, {name: batch[name] for name in ("tokens", "valid")}
    )
    state = stage.start({"policy": session.base_params()})
    state, metrics = stage.program("update", HEAD_FROM, state)(state, batch, jax.random.key(0))
    return state, jax.device_get(metrics), np.asarray(scored)


def kinds(tree: Any) -> list[str]:
    return [x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim]


@pytest.mark.slow
def test_what_waits_in_the_hosts_memory_gives_the_same_numbers(tmp_path: Path) -> None:
    plain, away = open_stage(False), open_stage(True)
    expected, found = run(plain), run(away)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
    state = found[0]
    assert set(kinds(state.opt_state)) == set(kinds(away.reference)) == {HOST_MEMORY}
    assert HOST_MEMORY not in kinds(state.params) + kinds(expected[0].opt_state) + kinds(plain.reference)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, saved(away, state), {}, force=True)
        restored, _ = checkpoints.restore(abstract_saved(away))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(saved(away, state)))
    assert set(kinds(restored["train"].opt_state)) == {HOST_MEMORY}


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_reference"])
def test_it_is_refused_on_cpus(key: str) -> None:
    with pytest.raises(ConfigError, match=f"config.{key} saves nothing where there is no accelerator"):
        tiny_session(**{key: True})
