"""The skeleton: padding, packing, chunks, remat, dtypes, one compilation, and a use for every field of a config."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.attention import attention, full_attend, visibility
from rljax.models.decoder import REMAT_POLICIES, Model, Params, hidden_states, row_positions
from rljax.models.layers import contract, dot
from rljax.models.params import init_params
from tests.models.tiny import layout, left_padded, random_tokens, row_logits, tiny_model, with_fields

LENGTH = 16


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(tiny_model("qwen2"), layout(), seed=0)


def hidden(
    model: Model,
    params: Params,
    tokens: Any,
    segments: Any,
    positions: Any,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> jax.Array:
    return hidden_states(model, layout(), params, tokens, segments, positions, dtype=dtype, remat=remat)


def test_left_padding_of_any_amount_changes_nothing(params: Params) -> None:
    """Row i holds the same five tokens behind i columns of other tokens that are marked as padding."""
    rows = LENGTH - 5
    tokens, valid = random_tokens(83, rows, LENGTH, seed=1), np.zeros((rows, LENGTH), bool)
    for i in range(rows):
        tokens[i, i : i + 5] = random_tokens(83, 1, 5)
        valid[i, i : i + 5] = True
    out = row_logits(tiny_model("qwen2"), layout(), params, tokens, valid)[valid].reshape(rows, 5, 83)
    np.testing.assert_allclose(out, out[:1].repeat(rows, 0), rtol=0, atol=1e-5)
    assert np.abs(out).max() > 1


def test_row_positions_count_real_tokens() -> None:
    valid = jnp.array([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(row_positions(valid), [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]])


@pytest.mark.parametrize("window", [None, 3])
def test_packed_segments_are_separate_rows(params: Params, window: int | None) -> None:
    model = with_fields(tiny_model("qwen2"), sliding_window=window)
    tokens = random_tokens(83, 1, LENGTH)
    segments = np.array([[1] * 4 + [2] * 7 + [3] * 3 + [0] * 2])
    positions = np.concatenate([np.arange(4), np.arange(7), np.arange(3), np.zeros(2)]).astype(np.int32)[None]
    run = jax.jit(hidden, static_argnums=0)
    packed = run(model, params, tokens, segments, positions)
    for part, (start, stop) in enumerate([(0, 4), (4, 11), (11, 14)]):
        alone = np.zeros((1, LENGTH), np.int32)
        alone[:, : stop - start] = tokens[:, start:stop]
        valid = np.arange(LENGTH)[None] < stop - start
        separate = run(model, params, alone, valid.astype(int), np.arange(LENGTH, dtype=np.int32)[None])
        np.testing.assert_allclose(
            packed[:, start:stop], separate[:, : stop - start], rtol=0, atol=1e-5, err_msg=f"part {part}"
        )


@pytest.mark.parametrize("window", [4, 5])
def test_the_window_ends_where_it_says(params: Params, window: int) -> None:
    """Three layers of window w reach 3 (w - 1) columns back."""
    model = with_fields(tiny_model("qwen2"), sliding_window=window)
    tokens = random_tokens(83, 2, LENGTH)
    tokens[1] = tokens[0]
    tokens[1, 0] = (tokens[0, 0] + 1) % 83
    out = row_logits(model, layout(), params, tokens, np.ones(tokens.shape, bool))
    changed = (out[0] != out[1]).any(axis=-1)
    reach = 3 * (window - 1)
    assert changed[: reach + 1].all() and not changed[reach + 1 :].any()


def test_attention_in_chunks_of_queries_is_attention() -> None:
    """Also where the chunk does not divide the row: 6 of 16."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, LENGTH, heads, 8)) for key, heads in zip(keys, (8, 2, 2), strict=True))
    valid = jnp.asarray(left_padded([16, 11], LENGTH))

    def run(chunk: int) -> list[jax.Array]:
        attend = full_attend(row_positions(valid), valid.astype(int), 7, layout(), 0.35, chunk=chunk)

        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(valid[..., None, None], jnp.sin(attend(q, k, v, None, 0)[0]), 0))

        return jax.tree.leaves(jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v))

    whole = run(LENGTH)
    for chunk in (4, 6):
        for mine, expected in zip(run(chunk), whole, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 40])
def test_blocks_of_queries_are_the_whole_square(window: int | None) -> None:
    """Three blocks of a row of 150: two packed sequences that a block's edge cuts, and one behind padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 150, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    segments = jnp.asarray([[1] * 70 + [2] * 80, [0] * 30 + [1] * 120])
    positions = jnp.asarray([[*range(70), *range(80)], [0] * 30 + [*range(120)]])
    seen = visibility(positions, positions, segments, segments, window)

    def blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return full_attend(positions, segments, window, layout(), 0.35)(q, k, v, None, 0)[0]

    def square(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen, 0.35)

    def run(attend: Any) -> list[jax.Array]:
        def total(*heads: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where((segments > 0)[..., None, None], jnp.sin(attend(*heads)), 0))

        program = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2))).lower(q, k, v).compile()
        work.append(program.cost_analysis()["flops"])
        return jax.tree.leaves(program(q, k, v))

    work: list[float] = []
    for mine, expected in zip(run(blocks), run(square), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)
    assert work[0] < 0.8 * work[1]


def test_attention_by_hand() -> None:
    """Query heads 0 and 1 read kv head 0. Scores ln 3 and 0 give weights 3/4 and 1/4; the unseen key has none."""
    q = jnp.full((1, 1, 2, 1), jnp.log(3.0))
    k = jnp.array([1.0, 0.0, 100.0]).reshape(1, 1, 3, 1)
    v = jnp.array([4.0, 8.0, jnp.finfo(jnp.float32).max]).reshape(1, 1, 3, 1)
    out = attention(q, k, v, jnp.array([[[True, True, False]]]), scale=1.0)
    np.testing.assert_allclose(out, np.full((1, 1, 2, 1), 5.0), rtol=1e-6)
    assert np.isfinite(attention(q, k, v / 1e9, jnp.zeros((1, 1, 3), bool), scale=1.0)).all()


def test_remat_policies_give_one_gradient_for_different_work(params: Params) -> None:
    tokens, valid = random_tokens(83, 2, LENGTH), left_padded([16, 9], LENGTH)
    positions = row_positions(jnp.asarray(valid))

    def gradient(remat: str) -> tuple[Any, float]:
        def total(params: Params) -> jax.Array:
            out = hidden(tiny_model("qwen2"), params, tokens, valid.astype(int), positions, remat=remat)
            return jnp.sum(jnp.where(valid[..., None], jnp.sin(out), 0))

        program = jax.jit(jax.value_and_grad(total)).lower(params).compile()
        return program(params), program.cost_analysis()["flops"]

    (expected, least), (saved, between), (block, most) = (gradient(remat) for remat in ("none", "dots", "block"))
    assert set(REMAT_POLICIES) == {"none", "dots", "block"}
    assert least < between < most
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[1]["layers"]))
    for other in (saved, block):
        for mine, leaf in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, leaf, rtol=1e-5, atol=1e-5 * np.abs(leaf).max())


def test_no_product_of_mixed_dtypes_in_either_direction(params: Params) -> None:
    """Read from the lowered program: bfloat16 compute on float32 weights, forward and backward."""
    tokens = jnp.zeros((2, LENGTH), int)

    def total(params: Params) -> jax.Array:
        return hidden(tiny_model("qwen2"), params, tokens, tokens + 1, tokens, jnp.bfloat16).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(total)).lower(params).as_text()
    types = re.findall(
        r"stablehlo\.dot_general.*: \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\) -> tensor<[\dx]*(\w+)>", text
    )
    assert len(types) == text.count("stablehlo.dot_general") >= 3 * 9  # 7 weights and 2 products of attention
    assert set(types) == {("bf16", "bf16", "f32")}
    gradient = jax.eval_shape(jax.grad(total), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("contracted", [1, 2])
def test_dot_and_its_derivative(contracted: int) -> None:
    shapes = {1: ((2, 3, 4), (4, 5, 6)), 2: ((2, 3, 4, 5), (4, 5, 6))}[contracted]
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tensordot(x, w, contracted, precision="highest")

    np.testing.assert_allclose(dot(x, w, contracted), plain(x, w), rtol=1e-5, atol=1e-6)
    mine, expected = (
        jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(x, w))), argnums=(0, 1))(x, w)
        for f in (lambda x, w: dot(x, w, contracted), plain)
    )
    for a, b in zip(mine, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_float32_master_gets_a_float32_gradient() -> None:
    """A sum of 257 ones, which bfloat16 rounds to 256."""
    x = jnp.ones((257, 1), jnp.bfloat16)
    gradient = jax.grad(lambda w: contract("bi,io->bo", x, w, jnp.float32).sum())(jnp.ones((1, 1), jnp.float32))
    assert gradient.dtype == jnp.float32 and gradient.item() == 257.0


def test_layers_are_compiled_once_and_so_is_the_program(params: Params) -> None:
    def program(layers: int) -> str:
        model = tiny_model("qwen2", num_hidden_layers=layers)
        shapes = jax.eval_shape(lambda: init_params(model, layout(), seed=0))
        tokens = jnp.zeros((2, LENGTH), int)
        return jax.jit(hidden, static_argnums=0).lower(model, shapes, tokens, tokens, tokens).as_text()

    assert program(3).count("stablehlo.dot_general") == program(30).count("stablehlo.dot_general") == 9

    def call(model: Model, *arrays: Any) -> jax.Array:  # a function of this test, whose cache nobody else fills
        return hidden(model, *arrays)

    run = jax.jit(call, static_argnums=0)
    positions = np.arange(LENGTH, dtype=np.int32)[None].repeat(2, 0)
    for seed in range(3):
        tokens = random_tokens(83, 2, LENGTH, seed)
        run(tiny_model("qwen2"), params, tokens, np.ones_like(tokens), positions)
    assert run._cache_size() == 1
