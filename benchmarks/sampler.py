"""The sampler alone, completions of full length: tokens a second by batch, and their share of what memory allows.

python -m benchmarks.sampler --size s --dtype bfloat16 --batches 1,8,64 --path refill|plain
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import Report, arguments, interleaved, median, memory_gib_per_s
from benchmarks.workload import (
    COMPLETION,
    PROMPT,
    check_rollout,
    decode_bytes,
    endless_session,
    forward_flops,
    grpo_config,
)
from rljax.refill_plan import plan_refill
from rljax.sampler import make_generate
from rljax.session import Session
from rljax.sharding import to_global
from rljax.types import Prompts


def random_prompts(session: Session, rows: int, length: int, group: int = 1) -> Prompts:
    """``rows`` requests in groups of ``group`` with one prompt each."""
    rng = np.random.default_rng(rows)
    tokens = rng.integers(3, session.model.config.vocab_size, (rows // group, length), dtype=np.int32)
    prompt_id = np.repeat(np.arange(rows // group, dtype=np.int32), group)
    sample_id = np.tile(np.arange(group, dtype=np.int32), rows // group)
    whole = Prompts(tokens[prompt_id], np.ones((rows, length), bool), prompt_id, sample_id)
    return jax.tree.map(lambda x: to_global(x, session.train.rows), whole)


def main() -> None:
    a = arguments(__doc__, batches="1,8,64", group=1, path="refill", prompt=PROMPT, completion=COMPLETION)
    ceiling = 0.0
    overrides = {"rollout.max_new_tokens": a.completion, "data.prompt_lengths": (a.prompt,)}
    for rows in map(int, a.batches.split(",")):
        group = min(a.group, rows)
        session = endless_session(grpo_config(a.size, a.dtype, **overrides), devices=1 if rows == 1 else None)
        sampling = session.sampling(session.config)
        params = session.base_params()
        ceiling = ceiling or memory_gib_per_s()  # asked once, when the devices are there
        report = Report("sampler", a.size, a.dtype, batch=rows, prompt=a.prompt, completion=a.completion, group=group)
        plan = plan_refill(session.decode, rows, group) if a.path == "refill" else None
        layouts = (session.model, session.train, session.decode)
        generate = make_generate(*layouts, sampling, dtype=session.dtype, refill=plan)
        prompts = random_prompts(session, rows, a.prompt, group)

        def run() -> object:
            return generate(params, prompts, jax.random.key(0), jnp.int32(0))  # noqa: B023

        samples = interleaved({"run": run}, a.repeats)["run"]
        rollout: Any = run()
        floor = decode_bytes(session, rows, a.prompt, a.completion, group) / 2**30 / ceiling
        report.line(
            samples,
            flops=forward_flops(session.model.config, rows, a.prompt + a.completion, a.completion),
            tokens=rows * a.completion,
            memory_floor_fraction=floor / median(samples),
            memory_gib_per_second=ceiling,
            largest_gap=check_rollout(session, params, rollout, a.prompt),
        )


if __name__ == "__main__":
    main()
