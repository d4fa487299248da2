"""int8 leaves: numbers by hand, the bound of the rounding, and products that keep their scales."""

import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.layers import dot
from rljax.models.params import declare, init_params, param_shardings, quantized, quantized_shardings
from rljax.models.quantized import Quantized, as_stored, dequantize, quantize, times_row_scales
from tests.models.tiny import layout, tiny_model

pytestmark = pytest.mark.fast


def test_by_hand() -> None:
    """Columns with largest numbers 1.27 and 2.54 have scales .01 and .02; .254 is 25.4 of one and 12.7 of the other."""
    x = quantize(jnp.array([[1.27, -2.54], [0.254, 0.254], [-0.5, 0.0]]), (0,))
    np.testing.assert_allclose(x.scale, [0.01, 0.02], rtol=1e-6)
    assert x.values.dtype == jnp.int8
    np.testing.assert_array_equal(x.values, [[127, -127], [25, 13], [-50, 0]])
    np.testing.assert_allclose(dequantize(x, (0,), jnp.float32), [[1.27, -2.54], [0.25, 0.26], [-0.5, 0]], rtol=1e-6)
    nothing = quantize(jnp.zeros((2, 3)), (1,))
    assert not np.asarray(dequantize(nothing, (1,), jnp.float32)).any()


def test_rounding_is_off_by_half_a_level_at_most() -> None:
    x = np.random.default_rng(0).normal(size=(64, 4, 16)).astype(np.float32)
    rounded = quantize(jnp.asarray(x), (0, 2))
    error = np.abs(dequantize(rounded, (0, 2), jnp.float32) - x)
    assert (error <= rounded.scale[None, :, None] * (0.5 + 1e-5)).all()
    assert error.max() > 0.4 * float(rounded.scale.min())


@pytest.mark.parametrize("contracted", [1, 2])
def test_a_product_is_that_of_the_rounded_weight(contracted: int) -> None:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 5, 7)))
    x = jnp.asarray(rng.normal(size=(2, 4, *w.shape[:contracted])))
    axes = tuple(range(contracted))
    rounded = quantize(w, axes)
    expected = dot(x, dequantize(rounded, axes, jnp.float32), contracted)
    np.testing.assert_allclose(dot(x, rounded, contracted), expected, rtol=1e-5, atol=1e-5)
    assert dot(x.astype(jnp.bfloat16), rounded, contracted).dtype == jnp.bfloat16


def test_scores_over_a_rounded_cache_are_those_over_what_it_stands_for() -> None:
    """[S, K, C, H] rows under queries [S, K, G, H]."""
    rng = np.random.default_rng(0)
    k, q = (jnp.asarray(rng.normal(size=(2, 3, 4, 8)).astype(np.float32)) for _ in range(2))
    held = as_stored(quantize(k, (-1,)), k)
    assert held.scale.shape == (2, 3, 4)
    plain = jnp.einsum("skgh,skch->skgc", q, dequantize(held, (-1,), jnp.float32))
    whole_numbers = jnp.einsum("skgh,skch->skgc", q, held.values.astype(jnp.float32))
    np.testing.assert_allclose(times_row_scales(whole_numbers, held), plain, rtol=1e-5, atol=1e-5)


def test_every_weight_of_a_layer_and_nothing_else_is_rounded() -> None:
    model, place = tiny_model("qwen2"), layout("1,2,2")
    tree = quantized(model, init_params(model, place, 0))
    rounded = {name for name, leaf in tree["layers"].items() if isinstance(leaf, Quantized)}
    assert rounded == {"q", "k", "v", "o", "gate", "up", "down"}
    c = model.config
    scales = {name: tree["layers"][name].scale.shape for name in ("q", "o", "down")}
    n = c.num_layers
    assert scales == {"q": (n, c.num_heads, c.head_dim), "o": (n, c.width), "down": (n, c.width)}
    assert not isinstance(tree["embed"], Quantized)
    places = quantized_shardings(model, place)
    assert places["layers"]["q"].values == param_shardings(model, place)["layers"]["q"]
    assert places["layers"]["q"].scale.spec[1] == "tensor" and places["layers"]["o"].scale.spec[1] == "fsdp"
    assert {name for name, p in declare(model)["layers"].items() if p.summed} == rounded
