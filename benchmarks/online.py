"""Steps of an online algorithm as a run takes them, timed by phase: what grpo_step and ppo_step share."""

from typing import Any

from benchmarks.common import Report, Sample, check, median, timed
from benchmarks.workload import LARGEST_GAP, forward_flops
from rljax.data.batches import DataPosition
from rljax.models.params import init_params
from rljax.stage_steps import StepResult, online_step
from rljax.stages import Stage

PHASES = ("rollout", "reward", "score", "update")
WARM_STEPS = 2


def measure_steps(stage: Stage, report: Report, repeats: int, passes: float) -> None:
    """``passes``: forward passes of the policy's size that a step's work is worth."""
    session, r = stage.session, stage.config.rollout
    rows, prompt = r.prompts_per_step * r.group_size, max(stage.config.data.prompt_lengths)
    trees = {tree: init_params(model, session.train, seed) for seed, (tree, model) in enumerate(stage.trees.items())}
    state, position = stage.start(trees), DataPosition()
    results: list[tuple[Sample, StepResult]] = []
    for number in range(WARM_STEPS + repeats):

        def step() -> None:
            nonlocal state, position
            result = online_step(stage, state, position, number)  # noqa: B023
            state, position = result.state, result.position
            metrics.append(result.metrics)  # noqa: B023

        metrics: list[Any] = []
        results.append((timed(step), metrics[0]))
    kept = results[WARM_STEPS:]
    forward = forward_flops(session.model.config, rows, prompt + r.max_new_tokens, r.max_new_tokens)
    phases = {name: [Sample(m[f"time/{name}_s"], s.other_cores) for s, m in kept] for name in PHASES}
    seconds = {f"{name}_seconds": median(each) for name, each in phases.items()}
    gap = max(m["train/first_max_log_ratio"] for _, m in results)
    dtype = report.fields["dtype"]
    report.line(
        [sample for sample, _ in kept],
        flops=passes * forward,
        tokens=rows * (prompt + r.max_new_tokens),
        **seconds,
        rollout_tokens_per_second=rows * r.max_new_tokens / seconds["rollout_seconds"],
        first_step_seconds=results[0][0].seconds,
        largest_gap=check("log-probs of sampler and trainer", gap, LARGEST_GAP[dtype]),
    )
