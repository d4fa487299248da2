"""The update over 1, 2, 4, 8 simulated devices: one gradient, work a device, collectives in the compiled program.

python -m benchmarks.scaling --size xs --devices 8
"""

import re

import jax
import numpy as np

from benchmarks.common import Report, arguments, check, interleaved
from benchmarks.packing import skewed_batch
from benchmarks.workload import COMPLETION, PROMPT, endless_session, grpo_config, online_stage, rows_flops
from rljax.sharding import to_global

COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def main() -> None:
    a = arguments(__doc__, devices=8)
    session = endless_session(grpo_config(a.size, a.dtype, mesh=f"1,{a.devices},1", cpu_devices=a.devices))
    host = skewed_batch(np.random.default_rng(0), session.model.config.vocab_size, PROMPT, COMPLETION)
    batch = {key: to_global(x, session.train.rows) for key, x in host.items()}
    stage = online_stage(session)
    state = stage.start({"policy": session.base_params()})
    report = Report("scaling", a.size, a.dtype, batch=len(host["tokens"]), mesh=f"1,{a.devices},1")
    program = stage.program("update", PROMPT, state)
    compiled = program.lower(state, batch, jax.random.key(0)).compile()
    collectives = COLLECTIVE.findall(compiled.as_text())
    norms = []

    def run() -> object:
        nonlocal state
        state, metrics = program(state, batch, jax.random.key(0))
        norms.append(float(metrics["grad_norm/policy"][0]))
        return state

    samples = interleaved({"run": run}, a.repeats)["run"]
    check("a gradient norm that is not finite", float(not np.isfinite(norms).all()), 0)
    report.line(
        samples,
        flops=3 * rows_flops(session.model.config, host["valid"], host["loss_mask"]),
        tokens=float(host["valid"].sum()),
        gradient_norm=norms[0],  # the same on every mesh
        gflops_a_device=compiled.cost_analysis()["flops"] / 1e9,
        temporaries_mib_a_device=compiled.memory_analysis().temp_size_in_bytes / 2**20,
        collectives={name: collectives.count(name) for name in sorted(set(collectives))},
    )


if __name__ == "__main__":
    main()
