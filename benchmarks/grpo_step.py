"""A GRPO step and its phases, as a run takes it: rollout, rewards, reference, update.

python -m benchmarks.grpo_step --size s --dtype bfloat16
"""

from benchmarks.common import Report, Sample, arguments, check, median, timed
from benchmarks.workload import (
    COMPLETION,
    GROUP,
    PROMPT,
    PROMPTS,
    endless_session,
    forward_flops,
    grpo_config,
    online_stage,
)
from rljax.data.batches import DataPosition
from rljax.stage_steps import online_step

PHASES = ("rollout", "reward", "score", "update")
# |log ratio| of any token before the first update: the sampler's log-probs against the trainer's.
LARGEST_GAP = {"float32": 1e-4, "bfloat16": 0.2}


def main() -> None:
    a = arguments(__doc__, kl=0.04, prompts=PROMPTS, group=GROUP, prompt=PROMPT, completion=COMPLETION, micro=0)
    config = grpo_config(a.size, a.dtype, **{"algo.kl_coef": a.kl, "batch.micro_batch_rows": a.micro})
    config.rollout.prompts_per_step, config.rollout.group_size = a.prompts, a.group
    config.rollout.max_new_tokens, config.data.prompt_lengths = a.completion, (a.prompt,)
    session = endless_session(config)
    rows, length = a.prompts * a.group, a.prompt + a.completion
    report = Report("grpo_step", a.size, a.dtype, batch=rows, prompt=a.prompt, completion=a.completion, kl=a.kl)
    stage = online_stage(session)
    state, position = stage.start({"policy": session.base_params()}), DataPosition()
    samples: list[Sample] = []
    phases: dict[str, list[Sample]] = {name: [] for name in PHASES}
    first, gaps = 0.0, []
    for number in range(a.repeats + 2):

        def step() -> None:
            nonlocal state, position, result
            result = online_step(stage, state, position, number)  # noqa: B023
            state, position = result.state, result.position

        result = None
        sample = timed(step)
        assert result is not None
        metrics = result.metrics
        gaps.append(metrics["train/first_max_log_ratio"])
        if number == 0:
            first = sample.seconds
        if number >= 2:
            samples.append(sample)
            for name in PHASES:
                phases[name].append(Sample(metrics[f"time/{name}_s"], sample.other_cores))
    forward = forward_flops(session.model.config, rows, length, a.completion)
    work = forward * (5 if a.kl else 4)  # a rollout has the head and the body once a token, an update three times
    seconds = {f"{name}_seconds": median(each) for name, each in phases.items()}
    report.line(
        samples,
        flops=work,
        tokens=rows * length,
        **seconds,
        rollout_tokens_per_second=rows * a.completion / seconds["rollout_seconds"],
        update_roofline_fraction=3 * forward / seconds["update_seconds"] / report.gflops / 1e9,
        first_step_seconds=first,
        largest_gap=check("log-probs of sampler and trainer", max(gaps), LARGEST_GAP[a.dtype]),
    )


if __name__ == "__main__":
    main()
