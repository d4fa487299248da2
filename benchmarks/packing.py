"""An update on rows of skewed lengths, packed into bins and one row a bin: the same gradient, fewer micro-batches.

python -m benchmarks.packing --size s --dtype bfloat16
python -m benchmarks.packing --size s --lengths gsm8k --prompt 192 --completion 256    (reads RLJAX_DATA)
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import Report, arguments, check, interleaved
from benchmarks.workload import (
    COMPLETION,
    PROMPT,
    endless_session,
    grpo_config,
    log_normal_lengths,
    online_stage,
    rows_flops,
)
from rljax.sharding import to_global

ROWS = 64
MEAN = 36  # tokens of a completion before it is cut at the budget


def gsm8k_lengths(prompt: int, completion: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the questions and answers of the first rows of GSM8K that fit, by Qwen2's tokenizer."""
    from transformers import AutoTokenizer

    folder = Path(os.environ.get("RLJAX_DATA", "../shared/data"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizers" / "qwen2", local_files_only=True)
    lines = (folder / "datasets" / "gsm8k" / "train.jsonl").read_text().splitlines()
    counts = np.asarray(
        [[len(tokenizer.encode(json.loads(x)[k])) for k in ("question", "answer")] for x in lines[:500]]
    )
    fitting = counts[(counts <= (prompt, completion)).all(axis=1)][:ROWS]
    return fitting[:, 0], fitting[:, 1]


def skewed_batch(
    rng: np.random.Generator, vocab: int, prompt: int, completion: int, lengths_of: str = "log_normal"
) -> dict[str, np.ndarray]:
    """Prompts of 8 tokens or more, completions of log-normal length, as GRPO's targets give them; or GSM8K's."""
    if lengths_of == "gsm8k":
        prompts, lengths = gsm8k_lengths(prompt, completion)
    else:
        prompts, lengths = rng.integers(8, prompt + 1, ROWS), log_normal_lengths(rng, ROWS, MEAN, completion)
    columns = np.arange(prompt + completion)
    valid = (columns >= prompt - prompts[:, None]) & (columns < prompt + lengths[:, None])
    numbers = {"behavior_logprobs": -9.0, "ref_logprobs": -9.0, "advantages": 1.0, "support": -np.inf}
    filled = {name: np.full(valid.shape, value, np.float32) for name, value in numbers.items()}
    filled["advantages"] *= rng.normal(size=(ROWS, 1)).astype(np.float32)
    tokens = rng.integers(3, vocab, valid.shape, dtype=np.int32)
    return {"tokens": tokens, "valid": valid, "loss_mask": valid & (columns >= prompt), **filled}


def main() -> None:
    a = arguments(__doc__, micro=8, prompt=PROMPT, completion=COMPLETION, lengths="log_normal")
    programs, results, reports = {}, {}, {}
    for name, pack in (("packed", True), ("row_a_bin", False)):
        settings = {"batch.pack": pack, "batch.micro_batch_rows": a.micro, "data.prompt_lengths": (a.prompt,)}
        session = endless_session(grpo_config(a.size, a.dtype, **settings, **{"rollout.max_new_tokens": a.completion}))
        host = skewed_batch(
            np.random.default_rng(0), session.model.config.vocab_size, a.prompt, a.completion, a.lengths
        )
        batch = {key: to_global(x, session.train.rows) for key, x in host.items()}
        stage = online_stage(session)
        results[name] = {"state": stage.start({"policy": session.base_params()})}
        reports[name] = Report(
            "packing", a.size, a.dtype, batch=ROWS, layout=name, micro_batch_rows=a.micro, lengths=a.lengths
        )

        def run(name: str = name, stage: Any = stage, batch: Any = batch, prompt: int = a.prompt) -> Any:
            state = results[name]["state"]
            state, metrics = stage.program("update", prompt, state)(state, batch, jax.random.key(0))
            results[name] |= {"state": state, "first": results[name].get("first") or jax.device_get(metrics)}
            return state

        programs[name] = run
        reports[name].compile(run)
    samples = interleaved(programs, a.repeats)
    one, other = (results[name]["first"] for name in programs)
    norms = [float(first["grad_norm/policy"][0]) for first in (one, other)]
    error = check("gradient norm", abs(norms[0] / norms[1] - 1), 1e-4 if a.dtype == "float32" else 0.02)
    padding = 1 - float(host["valid"].mean())
    flops = 3 * rows_flops(session.model.config, host["valid"], host["loss_mask"])
    for name, each in samples.items():
        tokens = float(host["valid"].sum())
        reports[name].line(each, flops=flops, tokens=tokens, padding_share=padding, error=error)


if __name__ == "__main__":
    main()
