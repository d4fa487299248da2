"""A model on any mesh: the same logits, the same initial weights, and no device that holds more than its share."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.attention import Cache, cached_attend, visibility
from rljax.models.decoder import check_tensor_degree, empty_cache, forward, logits
from rljax.models.hf import load_config, load_params
from rljax.models.params import abstract_params, init_params, param_shardings
from tests.models.tiny import layout, left_padded, random_tokens, row_logits, tiny_model

MESHES = ("1,8,1", "2,1,4", "1,1,8")


@pytest.mark.parametrize("mesh", MESHES)
def test_weights_and_logits_are_those_of_one_device(mesh: str) -> None:
    """Whatever the padding of the vocabulary; 8 query heads on 2 kv heads, which tensor 4 and 8 must repeat."""
    small, model = tiny_model("qwen2"), tiny_model("qwen2").padded_for(8)
    alone, many = init_params(small, layout(), seed=1), init_params(model, layout(mesh), seed=1)
    assert (len(alone["embed"]), len(many["embed"])) == (128, 1024)
    for leaf, mine in zip(jax.tree.leaves(alone), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(np.asarray(mine)[: len(leaf)], leaf)
    tokens = random_tokens(83, 8, 16)
    valid = left_padded([16, 16, 9, 1, 16, 5, 16, 16], 16)
    expected = row_logits(small, layout(), alone, tokens, valid)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(
        row_logits(model, layout(mesh), many, tokens, valid)[valid], expected[valid], rtol=0, atol=1e-5
    )


def test_babyllama361_on_a_tensor_mesh(data_dir: Path) -> None:
    """A vocabulary of 361 = 19 x 19, which nothing divides but itself."""
    folder = data_dir / "models" / "babyllama361-hf"
    place = layout("1,2,4")
    model = load_config(folder).padded_for(place.tensor)
    assert model.config.padded_vocab == 512
    params = load_params(folder, model, place)
    assert params["embed"].addressable_shards[0].data.shape == (128, 64)
    np.testing.assert_array_equal(np.asarray(params["embed"])[361:], 0)
    golden = np.load(data_dir / "golden" / "babyllama361-hf.npz")
    tokens = golden["ids0"][None].repeat(2, 0)
    mine = row_logits(model, place, params, tokens, np.ones(tokens.shape, bool))
    np.testing.assert_allclose(mine[1], golden["logits0"], rtol=0, atol=1e-4)


def test_padded_logits_are_minus_infinity() -> None:
    model = tiny_model().padded_for(1)
    scores = np.asarray(logits(model, {"embed": jnp.ones((128, 32))}, jnp.ones((2, 32))))
    assert scores.shape == (2, 128)
    assert np.isneginf(scores[:, 83:]).all() and np.isfinite(scores[:, :83]).all()


def test_parameters_are_born_sharded() -> None:
    place, model = layout("1,8,1"), tiny_model("qwen2").padded_for(8)
    params = init_params(model, place, seed=0)
    assert jax.tree.map(lambda x: x.sharding, params) == param_shardings(model, place)
    described, planned = (
        jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree) for tree in (params, abstract_params(model, place))
    )
    assert described == planned
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        whole = any(word in jax.tree_util.keystr(path) for word in ("norm", "bias"))
        assert leaf.addressable_shards[3].data.nbytes == leaf.nbytes // (1 if whole else 8), path


def test_another_seed_gives_other_weights() -> None:
    first, second = (init_params(tiny_model("qwen2"), layout(), seed=seed)["layers"] for seed in (1, 2))
    assert not np.array_equal(first["q"], second["q"])
    assert not np.array_equal(first["gate"], first["up"])
    np.testing.assert_allclose(np.std(first["down"]), 0.2, rtol=0.03)


def test_check_tensor_degree_lists_the_valid_ones() -> None:
    config = tiny_model().config  # 8 query heads, 2 kv heads
    for degree in (1, 2, 4, 8):
        check_tensor_degree(config, degree)
    with pytest.raises(ValueError, match=r"tensor degree of 3 .* valid degrees are 1, 2, 4, 8"):
        check_tensor_degree(config, 3)
    seven = tiny_model(num_attention_heads=14, num_key_value_heads=2).config  # Qwen2.5-0.5B
    with pytest.raises(ValueError, match=r"valid degrees are 1, 2, 14"):
        check_tensor_degree(seven, 4)
    with pytest.raises(ValueError, match=r"valid degrees are 1, 3, 9"):  # SmolLM2-135M
        check_tensor_degree(tiny_model(num_attention_heads=9, num_key_value_heads=3).config, 2)


def test_decoding_with_a_cache_gives_the_logits_of_whole_rows() -> None:
    """On a mesh whose tensor degree repeats kv heads, with a window that slides past the prompt."""
    place = layout("2,1,4")
    model = tiny_model("mistral", sliding_window=5).padded_for(8)
    params = init_params(model, place, seed=0)
    rows, length, prompt = 2, 12, 7
    tokens = random_tokens(83, rows, length)
    valid = left_padded([12, 8], length)
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0).astype(np.int32)
    segments = jnp.asarray(valid, jnp.int32)

    @jax.jit
    def step(cache: Cache, tokens: jax.Array, columns: jax.Array, start: jax.Array) -> tuple[jax.Array, Cache]:
        mine = jnp.take(positions, columns, axis=1)
        written = jnp.arange(length)[None] < start + tokens.shape[1]
        seen = visibility(mine, positions, jnp.take(segments, columns, axis=1), segments * written, 5)
        attend = cached_attend(start, seen, place, model.config.attention_scale)
        hidden, cache = forward(model, place, params, tokens, mine, attend, cache)
        return logits(model, params, hidden), cache

    cache = empty_cache(model, place, rows, length, jnp.float32)
    out = []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, length))]:
        scores, cache = step(cache, tokens[:, start:stop], np.arange(start, stop), start)
        out.append(scores)
    mine = np.concatenate(out, axis=1)[..., :83]
    np.testing.assert_allclose(mine[valid], row_logits(model, place, params, tokens, valid)[valid], rtol=0, atol=1e-5)
