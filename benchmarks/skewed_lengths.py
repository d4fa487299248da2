"""Completions of very unequal length: slots that refill against a fixed batch, in useful tokens a second.

python -m benchmarks.skewed_lengths --size s --dtype bfloat16

Every request has a budget of its own, log-normal as answers are, about 36 of at most 128 tokens in the mean; nothing
else ends a completion, so both paths write the same lengths.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import Report, arguments, check, interleaved
from benchmarks.sampler import random_prompts
from benchmarks.workload import (
    COMPLETION,
    GROUP,
    PROMPT,
    check_rollout,
    different_rows,
    endless_session,
    forward_flops,
    grpo_config,
    log_normal_lengths,
    rows_flops,
)
from rljax.refill_plan import RefillPlan
from rljax.sampler import make_generate
from rljax.sharding import to_global

MEAN = 41  # tokens before they are cut at the budget, which leaves 36


def main() -> None:
    a = arguments(__doc__, requests=256, slots=64, group=GROUP, prompt=PROMPT, completion=COMPLETION)
    overrides = {"rollout.max_new_tokens": a.completion, "data.prompt_lengths": (a.prompt,)}
    session = endless_session(grpo_config(a.size, a.dtype, **overrides))
    params, shards = session.base_params(), session.decode.data_shards
    report = Report("skewed_lengths", a.size, a.dtype, batch=a.slots, requests=a.requests, group=a.group)
    plan = RefillPlan(group=a.group, slots=a.slots // shards)
    layouts = (session.model, session.train, session.decode, session.sampling(session.config))
    refill = make_generate(*layouts, dtype=session.dtype, refill=plan)
    fixed = make_generate(*layouts, dtype=session.dtype)
    lengths = log_normal_lengths(np.random.default_rng(0), a.requests, MEAN, a.completion)
    budgets = to_global(lengths, session.train.rows)
    queue = random_prompts(session, a.requests, a.prompt, a.group)._replace(max_new_tokens=budgets)
    batches = [jax.tree.map(lambda x: x[i : i + a.slots], queue) for i in range(0, a.requests, a.slots)]  # noqa: B023
    key, version = jax.random.key(0), jnp.int32(0)

    def run_refill() -> Any:
        return refill(params, queue, key, version)

    def run_fixed() -> Any:
        return [fixed(params, batch, key, version) for batch in batches]

    report.compile(run_refill)
    samples = interleaved({"refill": run_refill, "fixed": run_fixed}, a.repeats)
    fast = run_refill()
    parts = run_fixed()
    slow = jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)
    written = np.asarray(fast.loss_mask.sum(axis=1))
    for rollout in (fast, slow):
        wrong = np.asarray(rollout.loss_mask.sum(axis=1)) != lengths
        check("lengths that are not those asked for", float(wrong.sum()), 0)
    tokens = int(written.sum())
    flops = rows_flops(session.model.config, np.asarray(fast.valid), np.asarray(fast.loss_mask))
    # A prompt is read once a group.
    flops -= forward_flops(session.model.config, a.requests - a.requests // a.group, a.prompt, 0)
    report.line(
        samples["refill"],
        flops=flops,
        tokens=tokens,
        fixed_batch_tokens_per_second=tokens / min(s.seconds for s in samples["fixed"]),
        decode_steps=int(fast.decode_steps.max()),
        fixed_batch_decode_steps=sum(int(part.decode_steps.max()) for part in parts),
        occupied_slot_share=tokens / float(fast.slot_steps.sum()),
        lengths="log-normal",
        mean_length=tokens / a.requests,
        different_rows=different_rows(fast, slow, a.dtype),
        largest_gap=check_rollout(session, params, fast, a.prompt),
    )


if __name__ == "__main__":
    main()
