"""The update over 1, 2, 4, 8 simulated devices: one gradient, work a device, collectives in the compiled program.

python -m benchmarks.scaling --size xs --devices 8
"""

import re
from argparse import Namespace
from typing import Any

import jax
import numpy as np

from benchmarks.common import Report, arguments, check, interleaved
from benchmarks.packing import skewed_batch
from benchmarks.workload import COMPLETION, PROMPT, endless_session, grpo_config, online_stage, rows_flops
from rljax.algos.base import Batch
from rljax.session import Session
from rljax.sharding import to_global
from rljax.steps import TrainState

COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def open_on(a: Namespace, devices: int) -> Session:
    """The first ``devices`` of all."""
    overrides = {"mesh": f"1,{devices},1", "cpu_devices": a.devices}
    return endless_session(grpo_config(a.size, a.dtype, **overrides), devices)


def start(session: Session, host: dict[str, np.ndarray]) -> tuple[Any, TrainState, Batch]:
    """The update and what it is called with."""
    stage = online_stage(session)
    state = stage.start({"policy": session.base_params()})
    batch = {key: to_global(x, session.train.rows) for key, x in host.items()}
    return stage.program("update", PROMPT, state), state, batch


def main() -> None:
    a = arguments(__doc__, devices=8)
    session = open_on(a, a.devices)
    host = skewed_batch(np.random.default_rng(0), session.model.config.vocab_size, PROMPT, COMPLETION)
    program, state, batch = start(open_on(a, 1), host)
    _, alone = program(state, batch, jax.random.key(0))
    program, state, batch = start(session, host)
    said = []
    report = Report("scaling", a.size, a.dtype, batch=len(host["tokens"]), mesh=f"1,{a.devices},1")
    compiled = program.lower(state, batch, jax.random.key(0)).compile()
    collectives = COLLECTIVE.findall(compiled.as_text())

    def run() -> object:
        nonlocal state
        state, metrics = program(state, batch, jax.random.key(0))
        said.append(metrics)
        return state

    samples = interleaved({"run": run}, a.repeats)["run"]
    pairs = [(float(said[0][name][0]), float(alone[name][0])) for name in ("loss", "grad_norm/policy")]
    error = max(abs(mine - other) / max(abs(other), 1e-2) for mine, other in pairs)
    report.line(
        samples,
        flops=3 * rows_flops(session.model.config, host["valid"], host["loss_mask"]),
        tokens=float(host["valid"].sum()),
        gradient_norm=pairs[1][0],
        error=check("gradient norm and loss against one device", error, 1e-3 if a.dtype == "float32" else 0.05),
        gflops_a_device=compiled.cost_analysis()["flops"] / 1e9,
        temporaries_mib_a_device=compiled.memory_analysis().temp_size_in_bytes / 2**20,
        collectives={name: collectives.count(name) for name in sorted(set(collectives))},
    )


if __name__ == "__main__":
    main()
