"""Benchmarks run: every command parses, and the smallest sizes of some go through with their checks."""

import argparse
import importlib
import json
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from benchmarks import head_chunks, long_prompts, scaling, torch_on_gpu, workload
from benchmarks.__main__ import GPU, GPU_PEER, SHORT, table


class Parsed(Exception):
    pass


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The lines of ``main`` with these arguments, on the devices that the tests have."""
    monkeypatch.setattr(workload, "start_devices", lambda config: None)
    monkeypatch.setattr("benchmarks.common.matmul_gflops", lambda dtype: 100.0)

    def run(main: Any, arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr("sys.argv", ["benchmark", *arguments.split()])
        main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.mark.parametrize("command", [*SHORT, *GPU, *GPU_PEER])
def test_every_command_has_a_file_that_knows_its_arguments(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser) -> None:
        assert parse(self).size in workload.SIZES
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(Parsed):
        importlib.import_module(f"benchmarks.{command.split()[0]}").main()


def test_the_heads_gradient_is_measured_in_blocks_and_checked(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunks, "CPU_VOCAB_BLOCK", 512)
    lines = said(head_chunks.main, "--size xs --tokens 640 --chunks 128,512 --repeats 1")
    assert [line["chunk"] for line in lines] == [128, 512]
    assert all(0 < line["error"] < 1e-5 and line["compile_seconds"] > 0 for line in lines)
    assert not any("peak_memory_gib" in line for line in lines)
    assert table(lines).count("head_chunks") == 2


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_rows_that_two_paths_have_in_common_are_checked(said: Any, dtype: str) -> None:
    sizes = "--size xs --prompts 8 --group 2 --prompt 8 --completion 6 --slots 16 --repeats 1"
    command = f"{sizes} --dtype {dtype}"
    lines = said(long_prompts.main, command)
    assert [line["layout"] for line in lines] == ["shared", "own", "fixed"]
    assert all(line["largest_gap"] <= workload.LARGEST_GAP[dtype] for line in lines)
    assert lines[-1]["different_rows"] == 0


class Written(NamedTuple):
    """Of a rollout what is checked."""

    tokens: Any
    behavior_logprobs: Any
    loss_mask: Any = np.ones((2, 3), bool)
    valid: Any = np.ones((2, 3), bool)


def test_log_probs_that_are_not_those_of_the_tokens_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 up to .2 is rounding. Rows may part at any token, and what they store before it has to agree."""
    tokens, zeros = np.arange(6).reshape(2, 3), np.zeros((2, 3))
    monkeypatch.setattr(workload, "make_score", lambda *options: lambda params, rows: zeros + 0.1)
    session: Any = SimpleNamespace(
        config=SimpleNamespace(compute_dtype="bfloat16"), sampling=lambda config: None, forward=lambda sampling: None
    )
    assert workload.check_rollout(session, None, Written(tokens, zeros), 1) == pytest.approx(0.1)
    with pytest.raises(SystemExit, match=r"log-probs of sampler and trainer: 0\.6 is above 0\.2"):
        workload.check_rollout(session, None, Written(tokens, zeros - 0.5), 1)

    parted, behind = tokens.copy(), zeros.copy()
    parted[1, 1:] = 9
    behind[1, 1:] = -5
    mine = Written(tokens, zeros)
    assert workload.different_rows(mine, Written(parted, behind), "bfloat16") == 0.5
    with pytest.raises(SystemExit, match=r"rows that differ from the plain path: 0\.5 is above"):
        workload.different_rows(mine, Written(parted, behind), "float32")
    with pytest.raises(SystemExit, match=r"tokens that two paths have in common: 5 is above"):
        workload.different_rows(mine, Written(tokens, behind), "bfloat16")


def test_one_gradient_on_every_mesh_is_checked(said: Any) -> None:
    (line,) = said(scaling.main, "--size xs --devices 2 --repeats 1")
    assert 0 <= line["error"] <= 1e-3 and line["collectives"]


def test_the_peer_says_what_it_needs_and_runs(said: Any) -> None:
    sizes = "--size xs --prompt 4 --completion 3 --repeats 1 --device cpu"
    (line,) = said(torch_on_gpu.main, f"{sizes} --batches 2")
    assert line["benchmark"] == "torch_generate" and line["tokens_per_second"] > 0
    (line,) = said(torch_on_gpu.main, f"{sizes} --work step --rows 4 --micro 2")
    assert line["benchmark"] == "torch_step" and line["batch"] == 4
    with pytest.raises(SystemExit, match="needs a PyTorch that sees a CUDA device, and this Python has none"):
        said(torch_on_gpu.main, "--size xs")
