"""Attention kernels for whole rows: splash attention on TPUs, cuDNN's on NVIDIA GPUs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.models.attention import Attend, replicate_kv
from rljax.sharding import Layout

LANES = 128
BLOCKS = (512, 384, 256, LANES)  # tokens; the largest that divides a row
CUDNN_HEAD_DIM = 128  # the widest head that every card with flash attention has


def choose(asked: str, layout: Layout, dtype: Any, length: int, head_dim: int) -> str:
    """xla, cudnn or flash: what ``asked`` names, or under auto what the mesh's devices and the shape allow.

    By the mesh's devices and not the default backend, which is a CPU's when a program for a TPU is compiled elsewhere.
    """
    if asked != "auto":
        return asked
    if layout.on_tpu and length >= LANES:
        return "flash"
    fits = dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= CUDNN_HEAD_DIM
    return "cudnn" if layout.on_nvidia and fits else "xla"


def kernel_attend(
    name: str, segments: Int[Array, "b t"], window: int | None, layout: Layout, scale: float, interpret: bool = False
) -> Attend:
    """As ``attention.full_attend``, whose tokens stand one behind the other in each segment; ``interpret`` for tests.

    Tokens of segment 0 are padding: what they get is finite and nobody's. The rows have to divide over data shards.
    """
    run: Callable[..., Array] = partial(flash, interpret=interpret) if name == "flash" else cudnn

    def attend(q: Array, k: Array, v: Array, cache: Any, layer: Array) -> tuple[Array, Any]:
        heads, kv_heads = (layout.spec(("batch", None, axis, None)) for axis in ("heads", "kv_heads"))
        shard: Callable[..., Array] = jax.shard_map(
            partial(run, window=window, scale=scale),
            mesh=layout.mesh,
            in_specs=(heads, kv_heads, kv_heads, layout.spec(("batch", None))),
            out_specs=heads,
            check_vma=False,
        )
        return shard(q, replicate_kv(k, layout), replicate_kv(v, layout), segments), cache

    return attend


def flash(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    segments: Int[Array, "b t"],
    *,
    window: int | None,
    scale: float,
    interpret: bool,
) -> Float[Array, "b t n h"]:
    """JAX's splash attention (Pallas, for TPUs): blocks that a causal mask or a window leaves out are not computed."""
    length = q.shape[1]
    spare = -length % LANES

    def rows_last(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0))).swapaxes(1, 2)

    kernel = _splash(length + spare, q.shape[2], window, interpret)
    ids = jnp.pad(segments, ((0, 0), (0, spare)))
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel has no scale
    out = jax.vmap(kernel)(rows_last(scaled), rows_last(k), rows_last(v), _segment_ids(ids))
    return out.swapaxes(1, 2)[:, :length]


def _splash(length: int, heads: int, window: int | None, interpret: bool) -> Callable[..., Array]:
    # Imported where it is used: Pallas takes half a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape, block = (length, length), next(size for size in BLOCKS if length % size == 0)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    sizes: Any = dict.fromkeys(
        ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block
    )
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        interpret=interpret,
    )


def _segment_ids(ids: Int[Array, "b t"]) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.SegmentIds(ids, ids)


def cudnn(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    segments: Int[Array, "b t"],
    *,
    window: int | None,
    scale: float,
    implementation: Any = "cudnn",
) -> Float[Array, "b t n h"]:
    """cuDNN's flash attention; which segment may see which goes in as a bias that all heads share."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=same,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
