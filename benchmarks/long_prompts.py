"""Long prompts with large groups: a prompt read once for its group, against once for every sample of it.

python -m benchmarks.long_prompts --size s --dtype bfloat16
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import Report, arguments, check, interleaved
from benchmarks.sampler import random_prompts
from benchmarks.workload import check_rollout, different_rows, endless_session, forward_flops, grpo_config
from rljax.refill_plan import RefillPlan
from rljax.sampler import make_generate

PROMPTS, GROUP, PROMPT, COMPLETION = 2, 32, 512, 32


def main() -> None:
    a = arguments(__doc__, prompts=PROMPTS, group=GROUP, prompt=PROMPT, completion=COMPLETION, slots=GROUP)
    overrides = {"rollout.max_new_tokens": a.completion, "data.prompt_lengths": (a.prompt,)}
    session = endless_session(grpo_config(a.size, a.dtype, **overrides))
    params, rows = session.base_params(), a.prompts * a.group
    slots = a.slots // session.decode.data_shards
    plans = {"shared": RefillPlan(group=a.group, slots=slots), "own": RefillPlan(group=1, slots=slots), "fixed": None}
    layouts = (session.model, session.train, session.decode, session.sampling(session.config))
    prompts = random_prompts(session, rows, a.prompt, a.group)
    fields = {"batch": slots, "requests": rows, "group": a.group, "prompt": a.prompt, "completion": a.completion}
    reports, programs = {}, {}
    written: dict[str, Any] = {}
    for name, plan in plans.items():
        reports[name] = Report("long_prompts", a.size, a.dtype, layout=name, **fields)
        generate = make_generate(*layouts, dtype=session.dtype, refill=plan)
        programs[name] = partial(generate, params, prompts, jax.random.key(0), jnp.int32(0))
        written[name] = reports[name].compile(programs[name])
    samples = interleaved(programs, a.repeats)
    for name, each in samples.items():
        short = float((written[name].loss_mask.sum(axis=1) != a.completion).sum())
        check("completions that are not of full length", short, 0)
        reports[name].line(
            each,
            # Of the work that has to be done: a prompt once for its group.
            flops=forward_flops(session.model.config, a.prompts, a.prompt, 0)
            + forward_flops(session.model.config, rows, a.prompt + a.completion, a.completion)
            - forward_flops(session.model.config, rows, a.prompt, 0),
            tokens=rows * a.completion,
            different_rows=different_rows(written[name], written["fixed"], a.dtype),
            largest_gap=check_rollout(session, params, written[name], a.prompt),
        )


if __name__ == "__main__":
    main()
