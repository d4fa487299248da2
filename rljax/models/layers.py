"""Building blocks of a layer: matrix products, norms, rotary positions, the gated feed-forward."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rljax.models.quantized import Quantized


class Param(NamedTuple):
    """A parameter, declared once: initialisation, sharding, checkpoint target and count all derive from it."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"  # normal | ones | zeros | score (a scalar head)
    summed: int = 0  # of a weight: its first axes, which ``dot`` contracts; the others are output channels


PRODUCT = "product"  # what a remat policy calls the result of ``dot``; a policy cannot look into a custom derivative


def dot(x: Float[Array, "*rows c"], w: Any, contracted: int = 1) -> Float[Array, "..."]:
    """Contract the last ``contracted`` axes of x with the first of w: the one door for weights.

    The result has x's dtype. A leaf that is no plain array (an adapter, a quantised weight) gets its own branch here.
    """
    rows, inner = x.ndim - contracted, "uvw"[:contracted]
    outer = "xyz"[: (w.values if isinstance(w, Quantized) else w).ndim - contracted]
    spec = f"{'abcde'[:rows]}{inner},{inner}{outer}->{'abcde'[:rows]}{outer}"
    if isinstance(w, Quantized):  # a scale an output channel: the sum is taken over the whole numbers
        return (contract(spec, x, w.values, wide_dtype(x.dtype)) * w.scale).astype(x.dtype)
    return checkpoint_name(contract(spec, x, w, x.dtype), PRODUCT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(spec: str, a: Float[Array, "..."], b: Float[Array, "..."], out_dtype: DTypeLike) -> Float[Array, "..."]:
    """An einsum of two arrays (each index in two of the three terms) that is never of mixed dtypes, either way.

    Both operands in a's dtype, accumulation in float32 (float64 for float64), result in ``out_dtype``. The derivative
    casts the cotangent to a's dtype and accumulates alike; plain autodiff would multiply float32 by bfloat16. b may be
    a float32 master copy and then gets a float32 gradient.
    """
    return _einsum(spec, a, b).astype(out_dtype)


def _einsum(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=wide_dtype(a.dtype))


def _contract_forward(spec: str, a: Array, b: Array, out_dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return contract(spec, a, b, out_dtype), (a, b)


def _contract_backward(spec: str, out_dtype: DTypeLike, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = saved
    operands, out = spec.split("->")
    left, right = operands.split(",")
    g = g.astype(a.dtype)
    da = _einsum(f"{out},{right}->{left}", g, b)
    db = _einsum(f"{left},{out}->{right}", a, g)
    return da.astype(a.dtype), db.astype(b.dtype)


contract.defvjp(_contract_forward, _contract_backward)


def wide_dtype(dtype: DTypeLike) -> DTypeLike:
    """What sums, softmaxes and norms are taken in: float32, or float64 where that is the compute dtype."""
    return jnp.promote_types(dtype, jnp.float32)


def add_bias(x: Float[Array, "b t n h"], bias: Float[Array, "n h"]) -> Float[Array, "b t n h"]:
    """In float32 and back, so that the bias's gradient is summed in float32 too."""
    wide = wide_dtype(x.dtype)
    return (x.astype(wide) + bias.astype(wide)).astype(x.dtype)


def rms_norm(x: Float[Array, "*b d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """x / rms(x) * weight, in float32 and back (1910.07467)."""
    wide = x.astype(wide_dtype(x.dtype))
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(wide.dtype)).astype(x.dtype)


def swiglu(w: dict, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """down(silu(gate(x)) * up(x)) (2002.05202)."""
    return dot(jax.nn.silu(dot(x, w["gate"])) * dot(x, w["up"]), w["down"])


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretch of the low frequencies; ``linear`` divides all of them by ``factor``."""

    kind: str  # llama3 | linear
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[np.ndarray, " half"]:
    """Radians a position for each rotary pair (2104.09864), stretched as the checkpoint was trained."""
    # float32 whatever the compute dtype, and on the host: a compiled power is an ulp off, which at position 10,000
    # shows in the logits. The frequencies are part of the checkpoint's definition.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / np.float32(scaling.factor)
    turns = scaling.original_max_positions * inverse / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (inverse * (smooth + (1 - smooth) / scaling.factor)).astype(np.float32)


class Rope(NamedTuple):
    cos: Float[Array, "b t half"]
    sin: Float[Array, "b t half"]


def make_rope(positions: Int[Array, "b t"], frequencies: Float[np.ndarray, " half"]) -> Rope:
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "b t n h"], rope: Rope) -> Float[Array, "b t n h"]:
    """Rotate pairs (i, i + H/2), the layout of Hugging Face checkpoints."""
    wide = wide_dtype(x.dtype)
    cos, sin = rope.cos[:, :, None].astype(wide), rope.sin[:, :, None].astype(wide)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
