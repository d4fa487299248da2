"""Programs for TPU slices, compiled without one: what they hold, and what their loops say to each other."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from tests.compile_for_tpu import MODELS, OFFLOADED, PROGRAMS, RING_KERNEL
from tests.compiled_text import loop_collectives, moved_in_loops, sampling_bytes, spans_shards, written_in_loops
from tests.tiny import ROOT

# What the compiler may use of a chip, GiB.
CHIPS = {"v5e:4x4": 15.75, "v5p:2x2x4": 95.0}
# The small model on the larger slice waits for the slow tests.
QUICK = {"v5e:4x4": tuple(MODELS), "v5p:2x2x4": ("qwen3-8b",)}
# A fifth of the time; bytes are within 3 % of those at full effort, or above them.
LITTLE_EFFORT = {"JAX_OPTIMIZATION_LEVEL": "O0"}


def start(topology: str, models: Iterable[str], **env: str) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "tests.compile_for_tpu", topology, *models]
    # Two at once: what is compiled for needs no chip, and so no lock on it.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **quiet, **env}, text=True, **pipes)  # type: ignore


def records(process: subprocess.Popen) -> dict[tuple[str, str], dict[str, Any]]:
    out, errors = process.communicate(timeout=1500)
    assert process.returncode == 0, errors[-3000:]
    found = [json.loads(line) for line in out.splitlines()]
    for record in found:
        print(record)
    return {(record["model"], record["program"]): record for record in found}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    pytest.importorskip("libtpu", reason="TPU programs are compiled by libtpu, which is in the extra dev")
    one, other = (start(topology, models, **LITTLE_EFFORT) for topology, models in QUICK.items())
    with one, other:
        return {"v5e:4x4": records(one), "v5p:2x2x4": records(other)}


def check(topology: str, models: Iterable[str], found: dict[tuple[str, str], dict[str, Any]]) -> None:
    away = {(OFFLOADED, f"offloading {program}") for program in ("score", "update") if OFFLOADED in models}
    ring = {(model, "rollout with a kernel") for model in models if (topology, model) == RING_KERNEL}
    assert set(found) == {(model, program) for model in models for program in PROGRAMS} | away | ring
    for key, record in found.items():
        assert record.get("chips", 16) == 16, (key, record)
        assert record["gib"] <= CHIPS[topology], (key, record)
        assert not record.get("logits"), (key, record)
        assert record.get("kernels", 1) > 0, (key, record)  # attention of whole rows, and over the ring
        if "rollout" in key[1]:
            check_loops(record)


def check_loops(record: dict[str, Any]) -> None:
    """What the loops of a rollout may not do."""
    assert record["uniform_steps"] == 1, record
    assert not record["crossing"], record
    # A head cut over the vocabulary says which block and what is in it, and no more than all blocks' masses.
    assert record["sampling_bytes"] <= record["masses_bytes"], record
    assert not record["moved"], record
    assert not record["layers_written"], record


@pytest.mark.parametrize("topology", CHIPS)
def test_a_step_fits_its_chips_and_its_loops_stay_in_their_shard(compiled: Any, topology: str) -> None:
    """State, reference, temporaries and program; no logits of a row; no collective across data shards in a loop.

    Scoring and update have attention's kernel.
    """
    check(topology, QUICK[topology], compiled[topology])


def test_what_waits_in_the_hosts_memory_is_not_on_the_chips(compiled: Any) -> None:
    check_offloading(compiled["v5e:4x4"])


def check_offloading(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Scoring lacks the moments, 8 bytes a parameter, the update the reference, 2 bytes: a chip holds its share."""
    share = 596_049_920 / found[OFFLOADED, "update"]["chips"] / 2**30
    for program, bytes_away in (("score", 8), ("update", 2)):
        away = found[OFFLOADED, f"offloading {program}"]
        assert away["gib"] < found[OFFLOADED, program]["gib"] - 0.8 * bytes_away * share
        assert away["host_gib"] > 0.9 * share * (2 if program == "score" else 8)


def test_tensor_parallel_loops_have_collectives(compiled: Any) -> None:
    """Four chips share a model there, so the test above had something to look at."""
    assert compiled["v5e:4x4"]["qwen3-8b", "rollout"]["loop_collectives"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("topology", CHIPS)
def test_at_full_effort(topology: str) -> None:
    pytest.importorskip("libtpu", reason="TPU programs are compiled by libtpu, which is in the extra dev")
    with start(topology, MODELS) as process:
        found = records(process)
    check(topology, MODELS, found)
    check_offloading(found)


def test_groups_that_span_shards_are_found() -> None:
    """16 devices, 4 a shard, in every notation of the compiler."""
    crosses = {
        "replica_groups={{0,1,2,3},{4,5,6,7}}, x": False,
        "replica_groups={{0,4},{1,5}}, x": True,
        "replica_groups=[4,4]<=[16], x": False,
        "replica_groups=[4,4]<=[4,4]T(1,0), x": True,
        "source_target_pairs={{0,1},{1,0}}, x": False,
        "source_target_pairs={{0,1},{3,4}}, x": True,
        "replica_groups={}, x": True,
    }
    assert {line: spans_shards(line, 4) for line in crosses} == crosses
    found = loop_collectives(PROGRAM)
    assert len(found) == 2
    assert [line.split()[0] for line in found if spans_shards(line, 4)] == ["%far"]


def test_what_loops_move_and_write_is_found() -> None:
    """In whatever they call; outside them, below the size, handed on in a fusion or prefetched is not."""
    assert [line.split()[0] for line in moved_in_loops(PROGRAM, 4096)] == ["%turned"]
    assert [line.split()[0] for line in written_in_loops(PROGRAM, [(2, 8, 4, 16)])] == ["%c"]
    assert sampling_bytes(PROGRAM, 4) == 8 * 32 * 4
    assert sampling_bytes(PROGRAM, 32) == 8 * 4


PROGRAM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}
%fused_computation.1 (x: f32[4]) -> f32[4] {
  %turned = f32[1,8,2,4,16]{4,3,1,2,0:T(8,128)} copy(%x)
  %small = f32[1,8,2,4,8]{4,3,1,2,0} transpose(%x)
  %far = f32[4] all-reduce(%x), replica_groups={{0,4}}, to_apply=%sum
}
%body (x: f32[4]) -> f32[4] {
  %near = (s32[8]{0}, f32[8,32]{1,0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}
  %early = f32[1,8,2,4,16]{4,3,2,1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%fused_computation.1
  %held = f32[1,8,2,4,16]{4,3,2,1,0} get-tuple-element(%x), index=0
  %c = f32[1,8,2,4,16]{4,3,2,1,0} fusion(%x), kind=kLoop, calls=%fused_computation.1
}
%cond (x: f32[4]) -> pred[] {
  ROOT %p = pred[] constant(true)
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %outside = f32[4] all-reduce(%x), replica_groups={{0,4}}, to_apply=%sum
  %before = f32[1,8,2,4,16] copy(%x)
  ROOT %w = f32[4] while(%x), condition=%cond, body=%body
}
"""
