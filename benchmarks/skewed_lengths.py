"""Completions of very unequal length: slots that refill against a fixed batch, in useful tokens a second.

python -m benchmarks.skewed_lengths --size s --dtype bfloat16

One token in 36 ends a completion: lengths are geometric, about 35 of at most 128 in the mean, the same on both paths.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import Report, arguments, check, interleaved
from benchmarks.sampler import random_prompts
from benchmarks.workload import COMPLETION, GROUP, PROMPT, endless_session, grpo_config
from rljax.refill import RefillPlan
from rljax.sampler import make_generate

MEAN = 36


def main() -> None:
    a = arguments(__doc__, requests=256, slots=64, group=GROUP, prompt=PROMPT, completion=COMPLETION)
    overrides = {"rollout.max_new_tokens": a.completion, "data.prompt_lengths": (a.prompt,)}
    session = endless_session(grpo_config(a.size, a.dtype, **overrides))
    ends = tuple(range(session.model.config.vocab_size // MEAN))
    sampling = dataclasses.replace(session.sampling(session.config), end_ids=ends)
    params, shards = session.base_params(), session.decode.data_shards
    report = Report("skewed_lengths", a.size, a.dtype, batch=a.slots, requests=a.requests, group=a.group)
    plan = RefillPlan(group=a.group, slots=a.slots // shards)
    layouts = (session.model, session.train, session.decode, sampling)
    refill = make_generate(*layouts, dtype=session.dtype, refill=plan)
    fixed = make_generate(*layouts, dtype=session.dtype)
    queue = random_prompts(session, a.requests, a.prompt, a.group)
    batches = [jax.tree.map(lambda x: x[i : i + a.slots], queue) for i in range(0, a.requests, a.slots)]  # noqa: B023
    key, version = jax.random.key(0), jnp.int32(0)

    def run_refill() -> Any:
        return refill(params, queue, key, version)

    def run_fixed() -> Any:
        return [fixed(params, batch, key, version) for batch in batches]

    samples = interleaved({"refill": run_refill, "fixed": run_fixed}, a.repeats)
    fast = run_refill()
    slow = jax.tree.map(lambda *parts: jnp.concatenate(parts), *run_fixed())
    same = jnp.mean((fast.tokens == slow.tokens).all(axis=1).astype(jnp.float32))
    tokens = int(fast.loss_mask.sum())
    fixed_seconds = min(s.seconds for s in samples["fixed"])
    report.line(
        samples["refill"],
        tokens=tokens,
        fixed_batch_tokens_per_second=tokens / fixed_seconds,
        lengths="geometric",
        mean_length=tokens / a.requests,
        # The same draws; rounding turns one of them now and then.
        different_rows=check(
            "rows that differ from the plain path", 1 - float(same), 0.05 if a.dtype == "float32" else 1
        ),
    )


if __name__ == "__main__":
    main()
