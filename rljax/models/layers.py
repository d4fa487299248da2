"""What blocks are made of: the one door for matrix products, norms, rotary positions, the gated feed-forward."""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Param(NamedTuple):
    """A parameter, declared once: initialisation, sharding, checkpoint target and count all derive from it."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"  # normal | ones | zeros


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(x: Float[Array, "*rows c"], w: Float[Array, "..."], contracted: int = 1) -> Float[Array, "..."]:
    """Contract the last ``contracted`` axes of x with the first of w: the one door for matrix products.

    Operands in x's dtype, accumulation in float32 (float64 for float64), result in x's dtype. The derivative casts the
    cotangent to x's dtype and accumulates alike, so that no product of mixed dtypes exists in either direction; w may
    be a float32 master copy and then gets a float32 gradient.
    """
    return _product(x, w.astype(x.dtype), contracted, (), x.dtype)


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _product(a: Array, b: Array, contracted: int, batch: tuple, out_dtype: jnp.dtype) -> Array:
    """Contract a's last axes with b's first."""
    dims = (tuple(range(a.ndim - contracted, a.ndim)), tuple(range(contracted)))
    return jax.lax.dot_general(a, b, (dims, ((), ())), preferred_element_type=_accumulator(a.dtype)).astype(out_dtype)


def _dot_forward(x: Array, w: Array, contracted: int) -> tuple[Array, tuple[Array, Array]]:
    return dot(x, w, contracted), (x, w)


def _dot_backward(contracted: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    g = g.astype(x.dtype)
    rows = x.ndim - contracted
    over_outputs = (tuple(range(rows, g.ndim)), tuple(range(contracted, w.ndim)))
    over_rows = (tuple(range(rows)), tuple(range(rows)))
    accumulate = partial(jax.lax.dot_general, preferred_element_type=_accumulator(x.dtype))
    dx = accumulate(g, w.astype(x.dtype), (over_outputs, ((), ())))
    dw = accumulate(x, g, (over_rows, ((), ())))
    return dx.astype(x.dtype), dw.astype(w.dtype)


dot.defvjp(_dot_forward, _dot_backward)


def rms_norm(x: Float[Array, "*b d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """x / rms(x) * weight, in float32 and back (1910.07467)."""
    wide = x.astype(_accumulator(x.dtype))
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


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[Array, " half"]:
    """Radians a position for each rotary pair (2104.09864), stretched as the checkpoint was trained."""
    # float32 throughout, whatever the compute dtype: the frequencies are part of the checkpoint's definition.
    inverse = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    wavelength = 2 * math.pi / inverse
    turns = scaling.original_max_positions / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return inverse * (smooth + (1 - smooth) / scaling.factor)


class Rope(NamedTuple):
    cos: Float[Array, "b t half"]
    sin: Float[Array, "b t half"]


def make_rope(positions: Int[Array, "b t"], frequencies: Float[Array, " half"]) -> Rope:
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "b t n h"], rope: Rope) -> Float[Array, "b t n h"]:
    """Rotate pairs (i, i + H/2), the layout of Hugging Face checkpoints."""
    wide = _accumulator(x.dtype)
    cos, sin = rope.cos[:, :, None].astype(wide), rope.sin[:, :, None].astype(wide)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
