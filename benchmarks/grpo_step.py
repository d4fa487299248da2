"""A GRPO step and its phases: 8 prompts x 8 samples, 64 + 128 tokens, one optimizer step.

python -m benchmarks.grpo_step --size s --dtype bfloat16
"""

from benchmarks.common import Report, arguments
from benchmarks.online import measure_steps
from benchmarks.workload import (
    COMPLETION,
    GROUP,
    KL,
    MICRO,
    PROMPT,
    PROMPTS,
    endless_session,
    grpo_config,
    online_stage,
)


def main() -> None:
    a = arguments(__doc__, kl=KL, prompts=PROMPTS, group=GROUP, prompt=PROMPT, completion=COMPLETION, micro=MICRO)
    config = grpo_config(a.size, a.dtype, **{"algo.kl_coef": a.kl, "batch.micro_batch_rows": a.micro})
    config.rollout.prompts_per_step, config.rollout.group_size = a.prompts, a.group
    config.rollout.max_new_tokens, config.data.prompt_lengths = a.completion, (a.prompt,)
    session = endless_session(config)
    rows = a.prompts * a.group
    report = Report("grpo_step", a.size, a.dtype, batch=rows, prompt=a.prompt, completion=a.completion, kl=a.kl)
    # A rollout is worth a pass, the reference another, an update three.
    measure_steps(online_stage(session), report, a.repeats, passes=5 if a.kl else 4)


if __name__ == "__main__":
    main()
