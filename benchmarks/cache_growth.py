"""What a decode step costs as the budget of completions, and with it the cache that it reads, grows.

python -m benchmarks.cache_growth --size s --dtype bfloat16 --completions 32,128,512
"""

import jax
import jax.numpy as jnp

from benchmarks.common import Report, arguments, check, interleaved, median
from benchmarks.sampler import LARGEST_GAP, random_prompts
from benchmarks.workload import PROMPT, endless_session, forward_flops, grpo_config
from rljax.forward import make_score
from rljax.refill_plan import RefillPlan
from rljax.sampler import make_generate


def main() -> None:
    a = arguments(__doc__, completions="32,128,512", batch=16, group=8, prompt=PROMPT)
    for completion in map(int, a.completions.split(",")):
        overrides = {"rollout.max_new_tokens": completion, "data.prompt_lengths": (a.prompt,)}
        session = endless_session(grpo_config(a.size, a.dtype, **overrides))
        sampling, params, c = session.sampling(session.config), session.base_params(), session.model.config
        report = Report("cache_growth", a.size, a.dtype, batch=a.batch, prompt=a.prompt, completion=completion)
        plan = RefillPlan(group=a.group, slots=a.batch // session.decode.data_shards)
        generate = make_generate(
            session.model, session.train, session.decode, sampling, dtype=session.dtype, refill=plan
        )
        prompts = random_prompts(session, a.batch, a.prompt, a.group)

        def run() -> object:
            return generate(params, prompts, jax.random.key(0), jnp.int32(0))  # noqa: B023

        samples = interleaved({"run": run}, a.repeats)["run"]
        rollout = run()
        score = make_score(session.forward(sampling), a.prompt, pieces=1)
        scored = score(params, {"tokens": rollout.tokens, "valid": rollout.valid})
        gap = jnp.max(jnp.abs(jnp.where(rollout.loss_mask, scored - rollout.behavior_logprobs, 0)))
        item = jnp.dtype(session.dtype).itemsize
        report.line(
            samples,
            flops=forward_flops(c, a.batch, a.prompt + completion, completion),
            tokens=a.batch * completion,
            seconds_a_step=median(samples) / completion,
            ring_mib=2 * c.num_layers * a.batch * completion * c.num_kv_heads * c.head_dim * item / 2**20,
            largest_gap=check("log-probs of sampler and trainer", float(gap), LARGEST_GAP[a.dtype]),
        )


if __name__ == "__main__":
    main()
