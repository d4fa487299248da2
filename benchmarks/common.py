"""What every benchmark shares: a clock that sees other processes, ceilings, one JSON line a measurement."""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import jax.numpy as jnp

from rljax.compiles import CompileCounter

CLEAN_CORES = 0.25  # a sample during which other processes used fewer cores than this is clean
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Sample(NamedTuple):
    seconds: float
    other_cores: float  # what other processes used meanwhile, in cores


def _busy_seconds() -> float:
    """CPU seconds of all processes since the machine started; 0 where the system does not tell."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def timed(run: Callable[[], Any]) -> Sample:
    busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
    jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    others = _busy_seconds() - busy - (time.process_time() - own)
    return Sample(seconds, max(0.0, others / seconds))


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int, warm: int = 1) -> dict[str, list[Sample]]:
    """Samples of each, taken in turns, so that what the machine does meanwhile hits all alike."""
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    for number in range(warm + repeats):
        for name, run in runs.items():
            sample = timed(run)
            if number >= warm:
                samples[name].append(sample)
    return samples


def median(samples: list[Sample]) -> float:
    """Of the clean samples where there are any, else of all."""
    clean = [s.seconds for s in samples if s.other_cores < CLEAN_CORES]
    return statistics.median(clean or [s.seconds for s in samples])


def contention(samples: list[Sample]) -> dict[str, Any]:
    others = [s.other_cores for s in samples]
    return {
        "samples": len(samples),
        "clean_samples": sum(cores < CLEAN_CORES for cores in others),
        "other_cores": round(statistics.median(others), 2),
    }


def matmul_gflops(dtype: Any, size: int | None = None) -> float:
    """The ceiling: a square product of ``dtype`` operands with float32 accumulation, best of a few."""
    size = size or (2048 if jax.devices()[0].platform == "cpu" else 8192)
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32).astype(dtype))
    seconds = min(timed(lambda: product(a)).seconds for _ in range(6))
    return 2 * size**3 / seconds / 1e9


def memory_gib_per_s(mib: int = 512) -> float:
    """Reads and writes of an add into a donated buffer, best of a few."""
    count = mib * 2**20 // 4
    add = jax.jit(lambda x, y: x + 3 * y, donate_argnums=0)
    x, y = jnp.ones(count), jnp.ones(count)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        x = jax.block_until_ready(add(x, y))
        best = min(best, time.perf_counter() - start)
    return 3 * 4 * count / best / 2**30


def peak_memory_gib() -> float:
    """Of the device where it tells, else of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30


class Report:
    """Prints a measurement; counts what was compiled since it was made.

    Where several programs run in one process, ``compile`` makes the first call of each, and peak memory is left out:
    it would be that of all of them.
    """

    def __init__(self, benchmark: str, size: str, dtype: str, **fields: Any):
        device = jax.devices()[0]
        self.fields = {"benchmark": benchmark, "size": size, "dtype": dtype, **fields}
        self.fields |= {"device": device.device_kind, "devices": len(jax.devices()), "cores": os.cpu_count()}
        self.fields |= {name: version(name) for name in ("rljax", "jax", "jaxlib")}
        self.gflops = matmul_gflops(DTYPES[dtype])
        self.compiled = CompileCounter()
        self.alone = True

    def compile(self, run: Callable[[], Any]) -> Any:
        """The first call of one of several programs: what compiles here is its own."""
        self.compiled.close()
        self.compiled, self.alone = CompileCounter(), False
        result = jax.block_until_ready(run())
        self.compiled.close()
        return result

    def line(self, samples: list[Sample], *, flops: float = 0.0, tokens: float = 0.0, **fields: Any) -> None:
        """``flops`` and ``tokens`` of one run give its share of the ceiling and its speed."""
        seconds = median(samples)
        result = self.fields | {"seconds": seconds, **contention(samples)}
        if tokens:
            result["tokens_per_second"] = tokens / seconds
        if flops:
            result |= {"roofline_fraction": flops / seconds / self.gflops / 1e9, "matmul_gflops": self.gflops}
        result["compile_seconds"] = self.compiled.seconds
        if self.alone:
            result["peak_memory_gib"] = peak_memory_gib()
        result |= fields
        print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}), flush=True)


def check(what: str, error: float, bound: float) -> float:
    """A benchmark whose result is wrong has measured nothing."""
    if not error <= bound:
        raise SystemExit(f"{what}: {error:.3g} is above {bound:.3g}; the measurement does not count")
    return error


def arguments(text: str, **defaults: Any) -> argparse.Namespace:
    """--size, --dtype, --repeats and what a benchmark adds, each with its default."""
    parser = argparse.ArgumentParser(description=text)
    for name, value in {"size": "s", "dtype": "float32", "repeats": 3, **defaults}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args()
