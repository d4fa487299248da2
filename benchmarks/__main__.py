"""``python -m benchmarks`` runs the short ones and prints a table; ``python -m benchmarks FILE`` prints that of a file.

Lines are kept in runs/benchmarks.jsonl. ``python -m benchmarks --gpu`` is for one NVIDIA card, its sizes for 80 GiB;
nobody has run it yet. ``--gpu-peer`` is the same work in PyTorch, by ``benchmarks/torch_on_gpu.py``.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SHORT = (
    "roofline --size s --repeats 3",
    "roofline --size s --repeats 3 --dtype bfloat16",
    "sampler --size s --repeats 2",
    "sampler --size s --repeats 2 --dtype bfloat16",
    "skewed_lengths --size s --repeats 1",
    "grpo_step --size s --repeats 3",
    "grpo_step --size s --repeats 3 --dtype bfloat16",
    "dpo_step --size s --repeats 3",
    "dpo_step --size s --repeats 3 --dtype bfloat16",
    "ppo_step --size s --repeats 1",
    "packing --size s --repeats 2",
    "head_chunks --size s --repeats 2",
    "long_prompts --size s --repeats 1",
    "cache_growth --size s --repeats 1",
    *(f"scaling --size xs --devices {devices}" for devices in (1, 2, 4, 8)),
)
GPU = (
    "roofline --size 1b --dtype bfloat16",
    *(f"sampler --size {size} --dtype bfloat16 --batches 1,64,256" for size in ("0.5b", "1b", "3b", "8b")),
    *(f"grpo_step --size {size} --dtype bfloat16 --micro 16" for size in ("0.5b", "1b", "3b")),
    *(f"dpo_step --size {size} --dtype bfloat16" for size in ("0.5b", "1b", "3b")),
    *(f"skewed_lengths --size {size} --dtype bfloat16" for size in ("1b", "8b")),
    *(
        f"long_prompts --size {size} --dtype bfloat16 --prompts 8 --prompt 2048 --completion 256 --slots {slots}"
        for size, slots in (("1b", 256), ("8b", 64))
    ),
    *(
        f"cache_growth --size {size} --dtype bfloat16 --batch {batch} --completions 128,512,2048"
        for size, batch in (("1b", 64), ("8b", 32))
    ),
)
GPU_PEER = (
    *(f"torch_on_gpu --work generate --size {size} --batches 1,64,256" for size in ("0.5b", "1b", "3b", "8b")),
    *(f"torch_on_gpu --work step --size {size}" for size in ("0.5b", "1b", "3b")),
)
GIVEN = {"": SHORT, "--gpu": GPU, "--gpu-peer": GPU_PEER}
COLUMNS = ("benchmark", "size", "dtype", "batch", "seconds", "tokens_per_second", "roofline_fraction", "other_cores")
PHASES = (
    "memory_floor_fraction",
    "rollout_seconds",
    "score_seconds",
    "update_seconds",
    "fixed_batch_tokens_per_second",
    "peak_memory_gib",
)


def run(commands: tuple[str, ...], path: Path) -> None:
    """Each in a process of its own, so that its peak memory is its own."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        for command in commands:
            print(f"python -m benchmarks.{command}", flush=True)
            done = subprocess.run([sys.executable, "-m", f"benchmarks.{command.split()[0]}", *command.split()[1:]],
                                  stdout=subprocess.PIPE, text=True)  # fmt: skip
            file.write(done.stdout)
            file.flush()
            if done.returncode:
                raise SystemExit(f"python -m benchmarks.{command} failed")


def table(lines: list[dict[str, Any]]) -> str:
    columns = (*COLUMNS, *PHASES)
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for line in lines:
        rows.append("| " + " | ".join(str(line.get(column, "")) for column in columns) + " |")
    return "\n".join(rows)


def main() -> None:
    given = sys.argv[1:]
    asked = given[0] if given else ""
    path = Path("runs/benchmarks.jsonl") if asked in GIVEN else Path(asked)
    if asked in GIVEN:
        run(GIVEN[asked], path)
    print(table([json.loads(line) for line in path.read_text().splitlines()]))


if __name__ == "__main__":
    main()
