"""From logits to a token: draws follow the softmax, truncation keeps the set it should, and keys are identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rljax.decoding import Sampling, draw, request_key, support_threshold
from rljax.losses.logprobs import token_logprobs, truncated_logprobs

VOCAB = 300  # two whole blocks of 128 and a third that is mostly padding
PADDED = 384
DRAWS = 100_000


def padded(logits: np.ndarray) -> jnp.ndarray:
    width = -(-logits.shape[-1] // 128) * 128
    grow = [(0, 0)] * (logits.ndim - 1) + [(0, width - logits.shape[-1])]
    return jnp.asarray(np.pad(logits, grow, constant_values=-np.inf), jnp.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def sampling(**settings: float) -> Sampling:
    return Sampling(max_new_tokens=1, end_ids=(0,), **settings)


def draw_tokens(keys: jax.Array, logits: jnp.ndarray, **settings: float) -> jax.Array:
    """One token for each key, all from the same logits."""
    one = jax.vmap(lambda key: draw(key[None], logits[:, None], sampling(**settings)).tokens[0])
    return jax.jit(one)(keys)


@pytest.fixture(scope="module")
def counts() -> tuple[np.ndarray, np.ndarray]:
    """How often each token was drawn, and the logits it was drawn from."""
    logits = np.random.default_rng(0).uniform(-1.5, 1.5, VOCAB)
    keys = jax.random.split(jax.random.key(1), DRAWS)
    tokens = draw_tokens(keys, padded(logits))
    return np.bincount(np.asarray(tokens), minlength=PADDED), logits


def test_draws_follow_the_softmax_over_several_blocks(counts: tuple[np.ndarray, np.ndarray]) -> None:
    seen, logits = counts
    assert seen[VOCAB:].sum() == 0
    expected = DRAWS * softmax(logits)
    assert expected.min() > 5  # what the chi-square approximation asks for
    assert stats.chisquare(seen[:VOCAB], expected).pvalue > 1e-3


def test_an_even_share_of_the_draws() -> None:
    """u = .3: (1 - u) softmax + u / V, also as log-prob; greedy draws stay the likeliest token."""
    logits = np.random.default_rng(0).uniform(-1.5, 1.5, VOCAB)
    mixed = 0.7 * softmax(logits) + 0.3 / VOCAB
    keys = jax.random.split(jax.random.key(1), DRAWS)
    seen = np.bincount(np.asarray(draw_tokens(keys, padded(logits), unimix=0.3)), minlength=PADDED)
    assert seen[VOCAB:].sum() == 0
    assert stats.chisquare(seen[:VOCAB], DRAWS * mixed).pvalue > 1e-3
    assert stats.chisquare(seen[:VOCAB], DRAWS * softmax(logits)).pvalue < 1e-3
    column = padded(logits)[:, None]
    for settings in ({"unimix": 0.3}, {"unimix": 0.3, "temperature": 0.0}):
        token, logprob, _ = jax.tree.map(lambda x: x[0], draw(keys[:1], column, sampling(**settings)))
        np.testing.assert_allclose(logprob, np.log(mixed[token]), rtol=1e-5)
    assert token == logits.argmax()


def test_the_chi_square_would_see_a_small_bias(counts: tuple[np.ndarray, np.ndarray]) -> None:
    """The same draws against a temperature 5 % off, and against a draw that prefers one block by 10 %."""
    seen, logits = counts
    assert stats.chisquare(seen[:VOCAB], DRAWS * softmax(1.05 * logits)).pvalue < 1e-3
    assert stats.chisquare(seen[:VOCAB], DRAWS * softmax(logits + 0.1 * (np.arange(VOCAB) < 128))).pvalue < 1e-3


def test_more_padding_changes_no_draw() -> None:
    """The vocabulary is padded to tensor x 128, and the mesh must not change a token."""
    logits = np.random.default_rng(1).normal(size=VOCAB)
    keys = jax.random.split(jax.random.key(2), 500)
    wider = np.pad(logits, (0, 1024 - VOCAB), constant_values=-np.inf)
    np.testing.assert_array_equal(draw_tokens(keys, padded(logits)), draw_tokens(keys, padded(wider)))


def test_float64_logits_draw_the_tokens_of_float32() -> None:
    logits = np.random.default_rng(2).normal(size=VOCAB)
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(3), 500)
        narrow = padded(logits)
        np.testing.assert_array_equal(draw_tokens(keys, narrow), draw_tokens(keys, narrow.astype(jnp.float64)))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}])
def test_a_draws_log_prob_is_that_of_the_trainers_function(settings: dict[str, float]) -> None:
    logits = padded(np.random.default_rng(6).normal(size=(40, VOCAB)))
    keys = jax.random.split(jax.random.key(5), 40)
    drawn, s = draw(keys, logits.T, sampling(**settings)), sampling(**settings)
    if s.truncates:
        expected = truncated_logprobs(logits, drawn.tokens, drawn.support, s.temperature)
    else:
        expected = token_logprobs(logits, drawn.tokens, s.temperature)
    np.testing.assert_allclose(drawn.logprobs, expected, atol=2e-6)


def test_greedy_rows_take_the_largest_among_rows_that_are_drawn() -> None:
    logits = padded(np.random.default_rng(7).normal(size=(50, VOCAB)))
    keys, greedy = jax.random.split(jax.random.key(6), 50), jnp.arange(50) % 2 == 0
    mixed = draw(keys, logits.T, sampling(), greedy).tokens
    np.testing.assert_array_equal(mixed[::2], logits.argmax(axis=-1)[::2])
    np.testing.assert_array_equal(mixed[1::2], draw(keys, logits.T, sampling()).tokens[1::2])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        # Probabilities .4, .3, .2, .1 of tokens 2, 0, 3, 1.
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.4}, {2}),  # .4 alone reaches it
        ({"top_p": 0.41}, {0, 2}),
        ({"top_p": 0.95}, {0, 1, 2, 3}),
        ({"min_p": 0.5}, {0, 2, 3}),  # at least half of .4
        ({"min_p": 0.51}, {0, 2}),
        ({"top_k": 2, "top_p": 0.5}, {2}),  # of the two kept, .4 / .7 = .57 reaches a half
        ({"top_k": 3, "min_p": 0.6}, {0, 2}),
        # Temperature 1/2 squares the odds: 16, 9, 4, 1 of 30, so .53 and .83 in order.
        ({"temperature": 0.5, "top_p": 0.55}, {0, 2}),
        ({"temperature": 0.5, "top_p": 0.52}, {2}),
        ({"temperature": 0.5, "min_p": 0.5}, {0, 2}),
    ],
)
def test_the_kept_set_by_hand(settings: dict[str, float], kept: set[int]) -> None:
    s = sampling(**settings)
    scaled = padded(np.log([[0.3, 0.1, 0.4, 0.2]])) / s.scoring_temperature
    threshold = support_threshold(scaled, s)
    assert set(np.flatnonzero(np.asarray(scaled >= threshold[:, None])[0, :4]).tolist()) == kept
    assert bool(jnp.isneginf(threshold[0])) == (len(kept) == 4)


def test_the_threshold_keeps_clear_of_rounding() -> None:
    """Halfway between the lowest kept and the highest cut logit: a trainer's rounding recovers the same set."""
    scaled = padded(np.array([[3.0, 1.0, 2.0, 0.0]]))
    np.testing.assert_allclose(support_threshold(scaled, sampling(top_k=2)), [1.5])


def test_equal_logits_at_the_edge_are_all_kept() -> None:
    scaled = padded(np.array([[2.0, 1.0, 1.0, 0.0]]))
    threshold = support_threshold(scaled, sampling(top_k=2))
    np.testing.assert_array_equal(np.asarray(scaled >= threshold[:, None])[0, :4], [True, True, True, False])


def test_truncated_draws_follow_the_renormalised_softmax() -> None:
    logits = np.log(np.array([0.3, 0.1, 0.4, 0.2]))
    s = sampling(top_k=3, temperature=0.5)
    keys = jax.random.split(jax.random.key(4), 20_000)
    drawn = jax.jit(draw, static_argnums=2)(keys, jnp.tile(padded(logits)[:, None], (1, 20_000)), s)
    tokens, support = drawn.tokens, drawn.support
    # Squares of .3, .4, .2 are 9, 16, 4 of 29.
    expected = 20_000 * np.array([9, 0, 16, 4]) / 29
    seen = np.bincount(tokens, minlength=4)
    assert seen[1] == 0
    assert stats.chisquare(seen[[0, 2, 3]], expected[[0, 2, 3]]).pvalue > 1e-3
    np.testing.assert_allclose(support, np.log(0.1 * 0.2), rtol=1e-6)  # halfway from 2 log .1 to 2 log .2


def test_temperature_0_takes_the_largest_whatever_the_key_and_the_truncation() -> None:
    logits = np.random.default_rng(5).normal(size=(6, VOCAB))
    for seed in (0, 1):
        keys = jax.random.split(jax.random.key(seed), 6)
        tokens, _, support = draw(keys, padded(logits).T, sampling(temperature=0.0, top_k=3))
        np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))
        assert np.isneginf(support).all()


def test_a_key_is_who_the_sample_is() -> None:
    root = jax.random.key(0)
    keys = [request_key(root, jnp.int32(p), jnp.int32(s)) for p in range(3) for s in range(3)]
    words = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
    assert len(words) == 9
    again = request_key(root, jnp.int32(2), jnp.int32(1))
    np.testing.assert_array_equal(jax.random.key_data(again), jax.random.key_data(keys[7]))
