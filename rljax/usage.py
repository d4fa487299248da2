"""Resource use of a step: model FLOPs, MFU, memory."""

from collections.abc import Iterable

import jax

from rljax.models.decoder import Model
from rljax.models.params import parameter_count
from rljax.session import Session

# Dense bf16 TFLOP/s a chip, from the vendors' data sheets (November 2026).
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
}


def flops_per_token(model: Model) -> float:
    """Of one forward pass, attention scores aside: 2 for each weight that a token meets (2001.08361)."""
    c = model.config
    embedding = 0 if c.tied_embeddings else c.vocab_size * c.width  # looked up, not multiplied
    return 2.0 * (parameter_count(model) - embedding)


def peak_tflops(session: Session) -> float | None:
    """The chip's peak: from the config, else from the table, else unknown."""
    if session.config.log.peak_tflops:
        return session.config.log.peak_tflops
    kind = session.train.mesh.devices.flat[0].device_kind
    matches = [name for name in PEAK_TFLOPS if kind.startswith(name)]
    return PEAK_TFLOPS[max(matches, key=len)] if matches else None


def usage_metrics(
    session: Session, metrics: dict[str, float], *, trained: Iterable[Model], passes: float
) -> dict[str, float]:
    """tokens/s by phase and a chip; MFU of updates where the peak is known, peak memory where the device tells it.

    ``passes``: how often a token of the step goes through the update of each ``trained`` model.
    """
    chips = session.train.mesh.size
    tokens = metrics["speed/tokens_per_s"] * metrics["time/step_s"]
    result = {"speed/tokens_per_s_per_chip": metrics["speed/tokens_per_s"] / chips}
    for phase in ("score", "update"):
        if metrics.get(f"time/{phase}_s"):
            result[f"speed/{phase}_tokens_per_s"] = tokens / metrics[f"time/{phase}_s"]
    peak = peak_tflops(session)
    if peak and "time/update_s" in metrics:
        # forward and backward: three forward passes' worth
        flops = 3 * passes * sum(map(flops_per_token, trained)) * tokens
        result["speed/mfu"] = flops / metrics["time/update_s"] / (chips * peak * 1e12)
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        result["memory/peak_gib"] = stats["peak_bytes_in_use"] / 2**30
    return result
