"""A DPO step: 8 pairs of 128 + 128 tokens, the reference scored in every step as the peers do.

python -m benchmarks.dpo_step --size s --dtype bfloat16
"""

from typing import Any

import jax
import numpy as np

from benchmarks.common import Report, Sample, arguments, check, median, timed
from benchmarks.workload import endless_session, forward_flops, grpo_config
from rljax.config.build import algo_defaults
from rljax.sharding import to_global
from rljax.stages import build_stage

PAIRS, PROMPT, COMPLETION = 8, 128, 128
WARM_STEPS = 2


def random_pairs(rng: np.random.Generator, vocab: int) -> dict[str, np.ndarray]:
    """Pairs that share their prompts, completions of full length."""
    prompts = np.repeat(rng.integers(3, vocab, (PAIRS, PROMPT)), 2, axis=0)
    tokens = np.concatenate([prompts, rng.integers(3, vocab, (2 * PAIRS, COMPLETION))], axis=1).astype(np.int32)
    trained = np.broadcast_to(np.arange(PROMPT + COMPLETION) >= PROMPT, tokens.shape)
    some = {"scores": np.tile(np.asarray([1, 0], np.float32), PAIRS), "answer_valid": np.ones(2 * PAIRS, bool)}
    return {"tokens": tokens, "valid": np.ones(tokens.shape, bool), "loss_mask": trained, **some}


def main() -> None:
    a = arguments(__doc__, micro=8)
    config = grpo_config(a.size, a.dtype, **{"batch.micro_batch_rows": a.micro})
    with config.unlocked():
        config.algo = algo_defaults("dpo")
    config.algo.beta = 0.1
    config.reward.names, config.batch.rows, config.data.row_length = (), PAIRS, PROMPT + COMPLETION
    session = endless_session(config)
    report = Report("dpo_step", a.size, a.dtype, batch=2 * PAIRS, prompt=PROMPT, completion=COMPLETION)
    stage = build_stage(session, session.config, 0, None, None)
    stage.freeze("reference", session.base_params())
    state, rng = stage.start({"policy": session.base_params()}), np.random.default_rng(0)
    samples: dict[str, list[Sample]] = {"score": [], "update": []}
    first: dict[str, Any] = {}
    for number in range(WARM_STEPS + a.repeats):
        batch = {
            k: to_global(x, session.train.rows) for k, x in random_pairs(rng, session.model.config.vocab_size).items()
        }

        def score() -> Any:
            batch["ref_logprobs"] = stage.program("score_reference", 1)(stage.reference, batch)  # noqa: B023
            return batch  # noqa: B023

        def update() -> Any:
            nonlocal state, metrics
            state, metrics = stage.program("update", 1, state)(state, batch, jax.random.key(number))  # noqa: B023
            return state

        metrics: dict[str, Any] = {}
        for name, phase in (("score", score), ("update", update)):
            samples[name].append(timed(phase))
        first = first or jax.device_get(metrics)
    score, update = (each[WARM_STEPS:] for each in samples.values())
    whole = [
        Sample(s.seconds + u.seconds, max(s.other_cores, u.other_cores)) for s, u in zip(score, update, strict=True)
    ]
    forward = forward_flops(session.model.config, 2 * PAIRS, PROMPT + COMPLETION, COMPLETION)
    report.line(
        whole,
        flops=4 * forward,
        tokens=2 * PAIRS * (PROMPT + COMPLETION),
        score_seconds=median(score),
        update_seconds=median(update),
        # The policy is its reference at first, so the loss is log 2.
        loss_error=check(
            "first loss", abs(float(first["loss"][0]) - np.log(2)), 1e-3 if a.dtype == "float32" else 0.05
        ),
    )


if __name__ == "__main__":
    main()
