"""What a decode step costs as the budget of completions, and with it the cache that it reads, grows.

python -m benchmarks.cache_growth --size s --dtype bfloat16 --completions 32,128,512
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import Report, arguments, interleaved, median, memory_gib_per_s
from benchmarks.sampler import random_prompts
from benchmarks.workload import PROMPT, check_rollout, decode_bytes, endless_session, forward_flops, grpo_config
from rljax.refill_plan import RefillPlan
from rljax.sampler import make_generate


def main() -> None:
    a = arguments(__doc__, completions="32,128,512", batch=16, group=8, prompt=PROMPT)
    ceiling = 0.0
    for completion in map(int, a.completions.split(",")):
        overrides = {"rollout.max_new_tokens": completion, "data.prompt_lengths": (a.prompt,)}
        session = endless_session(grpo_config(a.size, a.dtype, **overrides))
        sampling, params, c = session.sampling(session.config), session.base_params(), session.model.config
        ceiling = ceiling or memory_gib_per_s()  # asked once, when the devices are there
        report = Report("cache_growth", a.size, a.dtype, batch=a.batch, prompt=a.prompt, completion=completion)
        plan = RefillPlan(group=a.group, slots=a.batch // session.decode.data_shards)
        generate = make_generate(
            session.model, session.train, session.decode, sampling, dtype=session.dtype, refill=plan
        )
        prompts = random_prompts(session, a.batch, a.prompt, a.group)

        def run() -> object:
            return generate(params, prompts, jax.random.key(0), jnp.int32(0))  # noqa: B023

        samples = interleaved({"run": run}, a.repeats)["run"]
        rollout: Any = run()
        floor = decode_bytes(session, a.batch, a.prompt, completion, a.group) / 2**30 / ceiling
        item = jnp.dtype(session.dtype).itemsize
        report.line(
            samples,
            flops=forward_flops(c, a.batch, a.prompt + completion, completion),
            tokens=a.batch * completion,
            seconds_a_step=median(samples) / completion,
            ring_mib=2 * c.num_layers * a.batch * completion * c.num_kv_heads * c.head_dim * item / 2**20,
            memory_floor_fraction=floor / median(samples),
            memory_gib_per_second=ceiling,
            largest_gap=check_rollout(session, params, rollout, a.prompt),
        )


if __name__ == "__main__":
    main()
