"""The machine's ceilings: matrix products by dtype and shape, and memory.

python -m benchmarks.roofline --dtype bfloat16
"""

import jax
import jax.numpy as jnp

from benchmarks.common import DTYPES, Report, arguments, check, interleaved, memory_gib_per_s
from benchmarks.workload import COMPLETION, SIZES

TOKENS = 8 * 8 * (64 + COMPLETION)


def shapes(size: str) -> dict[str, tuple[int, int, int]]:
    """Rows, contracted, columns of the products that a step of this size is made of, and a large square."""
    width, _, heads, _, head_dim, ffn, vocab, _ = SIZES[size]
    return {
        "square": (2048, 2048, 2048),
        "query": (TOKENS, width, heads * head_dim),
        "gate": (TOKENS, width, ffn),
        "down": (TOKENS, ffn, width),
        "gate_gradient": (width, TOKENS, ffn),
        "head_chunk": (1024, width, vocab),
        "decode_head": (64, width, vocab),
    }


def main() -> None:
    a = arguments(__doc__, repeats=5)
    dtype = DTYPES[a.dtype]
    product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(dtype))
    for name, (rows, inner, columns) in shapes(a.size).items():
        report = Report("roofline", a.size, a.dtype, batch=rows, product=name, shape=[rows, inner, columns])
        x = jax.random.normal(jax.random.key(0), (rows, inner)).astype(dtype)
        y = jax.random.normal(jax.random.key(1), (inner, columns)).astype(dtype)
        samples = interleaved({"run": lambda: product(x, y)}, a.repeats)["run"]  # noqa: B023
        exact = jnp.sum(x[0].astype(jnp.float32) * y[:, 0].astype(jnp.float32))
        error = float(jnp.abs(product(x, y)[0, 0] - exact)) / inner**0.5
        flops = 2 * rows * inner * columns
        gflops = flops / min(s.seconds for s in samples) / 1e9
        report.line(samples, flops=flops, gflops=gflops, error=check(name, error, 0.01))
    report = Report("roofline", a.size, "float32", batch=1, product="memory")
    seconds = interleaved({"run": lambda: jnp.zeros(1)}, 1)["run"]
    report.line(seconds, gib_per_second=memory_gib_per_s())


if __name__ == "__main__":
    main()
