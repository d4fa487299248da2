"""Kernels for whole rows against XLA's attention: packed segments, windows, grouped heads, shards, gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.attention import full_attend
from rljax.models.kernels import choose, cudnn, kernel_attend
from rljax.sharding import Layout
from tests.models.tiny import layout

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 150, 4, 2, 16  # not whole blocks of 128
SCALE = WIDTH**-0.5
# Two parts and padding behind them; padding, a part and padding.
PARTS = ((0, (1, 70), (2, 60)), (30, (3, 100)))


def inputs() -> tuple[list[jax.Array], np.ndarray, np.ndarray]:
    """q, k and v; segments; positions that restart in each."""
    segments, positions = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), np.int32)
    for row, (start, *parts) in enumerate(PARTS):
        for number, size in parts:
            segments[row, start : start + size], positions[row, start : start + size] = number, np.arange(size)
            start += size
    rng = np.random.default_rng(0)
    shapes = [(ROWS, LENGTH, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes], segments, positions


def output_and_gradients(attend: Any, segments: np.ndarray) -> Any:
    """Of the tokens that are real: what padding gets is nobody's."""
    real = (segments > 0)[..., None, None]

    def total(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        out = jnp.where(real, attend(q, k, v, None, jnp.int32(0))[0], 0)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs()[0])
    return out, gradients


def expected(window: int | None, place: Layout) -> Any:
    _, segments, positions = inputs()
    return output_and_gradients(full_attend(positions, segments, window, place, SCALE), segments)


@pytest.mark.parametrize(("window", "mesh"), [(None, "1,1,1"), (40, "1,2,2")])
def test_flash_is_xla_s(window: int | None, mesh: str) -> None:
    """Splash attention, interpreted."""
    place, segments = layout(mesh), inputs()[1]
    found = output_and_gradients(kernel_attend("flash", segments, window, place, SCALE, interpret=True), segments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, expected(window, place))


@pytest.mark.parametrize("window", [None, 40])
def test_what_cudnn_is_asked_for_is_xla_s(window: int | None) -> None:
    """The same call with JAX's own implementation: cuDNN's needs a card."""
    segments = inputs()[1]

    def attend(q: Any, k: Any, v: Any, cache: Any, layer: Any) -> tuple[Any, Any]:
        return cudnn(q, k, v, segments, window=window, scale=SCALE, implementation="xla"), cache

    found = output_and_gradients(attend, segments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, expected(window, layout()))


class Device:
    def __init__(self, platform: str, kind: str):
        self.platform, self.device_kind = platform, kind


class FakeMesh:
    def __init__(self, device: Device):
        self.devices = np.array([device])


def test_auto_goes_by_the_mesh_s_devices_and_the_shape() -> None:
    cpu, tpu, nvidia = (
        Layout(FakeMesh(Device(*names)), ())  # type: ignore[arg-type]
        for names in (("cpu", "cpu"), ("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100"))
    )
    assert choose("auto", cpu, jnp.bfloat16, 512, 64) == "xla"
    assert choose("auto", tpu, jnp.bfloat16, 512, 64) == "flash"
    assert choose("auto", tpu, jnp.bfloat16, 64, 64) == "xla"  # shorter than a block
    assert choose("auto", nvidia, jnp.bfloat16, 512, 64) == "cudnn"
    assert choose("auto", nvidia, jnp.float32, 512, 64) == "xla"
    assert choose("auto", nvidia, jnp.bfloat16, 512, 256) == "xla"
    assert choose("xla", tpu, jnp.bfloat16, 512, 64) == "xla"
