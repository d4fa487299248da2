"""Log-probs and their gradient from hidden states, by chunk size: the head is half of an update at a small width.

python -m benchmarks.head_chunks --size s --dtype bfloat16 --chunks 256,1024,4096
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import DTYPES, Report, arguments, check, interleaved
from benchmarks.workload import COMPLETION, SIZES
from rljax.forward import CPU_VOCAB_BLOCK
from rljax.losses import chunked_logprobs, head_logits
from rljax.losses.logprobs import token_logprobs

PLAIN_ROWS = 512  # whose logits exist at once where the gradient is checked


def relative_error(x: Any, expected: Any) -> float:
    return float(jnp.linalg.norm(x - expected) / jnp.linalg.norm(expected))


def main() -> None:
    a = arguments(__doc__, chunks="256,512,1024,2048,4096", tokens=64 * COMPLETION)
    block = CPU_VOCAB_BLOCK if jax.devices()[0].platform == "cpu" else None  # as updates have it
    width, vocab, dtype = SIZES[a.size][0], SIZES[a.size][6], DTYPES[a.dtype]
    hidden = jax.random.normal(jax.random.key(0), (a.tokens, width)).astype(dtype)
    table = 0.02 * jax.random.normal(jax.random.key(1), (vocab, width))
    targets = jax.random.randint(jax.random.key(2), (a.tokens,), 0, vocab)

    def loss(chunk: int, hidden: Any, table: Any) -> Any:
        stats = chunked_logprobs(hidden, table, targets, chunk_size=chunk, with_entropy=True, vocab_block=block)
        return jnp.sum(stats.logprobs)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def plain(hidden: Any, table: Any, targets: Any) -> Any:
        return jnp.sum(token_logprobs(head_logits(hidden, table), targets))

    chunks = [int(text) for text in a.chunks.split(",")]
    programs = {str(chunk): jax.jit(jax.grad(partial(loss, chunk), argnums=(0, 1))) for chunk in chunks}
    reports = {name: Report("head_chunks", a.size, a.dtype, batch=a.tokens, chunk=int(name)) for name in programs}
    expected = (jnp.zeros(hidden.shape), jnp.zeros(table.shape))  # of whole logits, some rows at a time
    for start in range(0, a.tokens, PLAIN_ROWS):
        rows = slice(start, start + PLAIN_ROWS)
        d_hidden, d_table = plain(hidden[rows], table, targets[rows])
        expected = (expected[0].at[rows].set(d_hidden), expected[1] + d_table)
    errors = {}
    for name, program in programs.items():
        gradient = reports[name].compile(partial(program, hidden, table))
        errors[name] = max(map(relative_error, gradient, expected))
    runs = {name: partial(program, hidden, table) for name, program in programs.items()}
    for name, samples in interleaved(runs, a.repeats).items():
        flops = 2 * 4 * a.tokens * vocab * width  # the backward pass makes the logits again
        bound = 1e-5 if a.dtype == "float32" else 0.02
        reports[name].line(samples, flops=flops, tokens=a.tokens, error=check("gradient", errors[name], bound))


if __name__ == "__main__":
    main()
