"""What is read off a pass, against whole logits: top tokens, collisions, scalar heads and where they are read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos.base import Batch
from rljax.forward import as_values, last_scores, make_reward, make_teacher, make_value
from rljax.losses.head_logits import reduce_logits_in_chunks
from rljax.models.decoder import hidden_states, logits, row_positions
from rljax.models.params import declare, init_params, init_scalar_head, map_params
from rljax.sharding import to_global
from tests.models.tiny import layout, tiny_model
from tests.truths import random_batch, tiny_forward

V, P, C, K = 61, 3, 5, 4
MODEL = tiny_model("llama", vocab_size=V, num_hidden_layers=1, hidden_size=16)
SCALAR = MODEL._replace(scores=1)
MESHES = ["1,1,1", "1,4,1"]


def batch() -> Batch:
    made = random_batch(np.random.default_rng(0), V, [(3, 5), (1, 2), (2, 1), (3, 3)], P, C)
    return {**made, "teacher_tokens": np.random.default_rng(1).integers(0, V, (4, P + C, K), dtype=np.int32)}


def placed(mesh: str) -> Batch:
    return {name: to_global(x.astype(np.float32) if x.dtype == np.float64 else x, layout(mesh).rows)
            for name, x in batch().items()}  # fmt: skip


@pytest.fixture(scope="module")
def logprobs() -> np.ndarray:
    """Entry t is the distribution that token t is drawn from; column 0 has none."""
    rows, place = batch(), layout()
    params = init_params(MODEL, place, seed=0)
    valid = jnp.asarray(rows["valid"])
    hidden = hidden_states(MODEL, place, params, rows["tokens"], valid.astype(jnp.int32), row_positions(valid))
    whole = np.asarray(jax.nn.log_softmax(logits(MODEL, params, hidden)[..., :V], axis=-1))
    return np.concatenate([np.zeros_like(whole[:, :1]), whole[:, :-1]], axis=1)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_teachers_top_tokens_are_those_of_its_whole_distribution(logprobs: np.ndarray, mesh: str) -> None:
    params = init_params(MODEL, layout(mesh), seed=0)
    tokens, values = make_teacher(tiny_forward(MODEL, layout(mesh)), P, 1, K)(params, placed(mesh))
    mask = batch()["loss_mask"]
    expected = -np.sort(-logprobs, axis=-1)[..., :K]
    np.testing.assert_allclose(np.asarray(values)[mask], expected[mask], atol=2e-6)
    at_tokens = np.take_along_axis(logprobs, np.asarray(tokens), axis=-1)
    np.testing.assert_allclose(at_tokens[mask], expected[mask], atol=2e-6)


def test_an_even_share_is_in_the_log_probs_of_what_was_sampled(logprobs: np.ndarray) -> None:
    """Rows with a support were sampled; a frozen model's pass has none and is the model's own."""
    forward, params = tiny_forward(MODEL, layout(), unimix=0.3), init_params(MODEL, layout(), seed=0)
    rows, mask = placed("1,1,1"), batch()["loss_mask"]
    chosen = np.take_along_axis(logprobs, batch()["tokens"][..., None], axis=-1)[..., 0]
    frozen = {name: x for name, x in rows.items() if name != "support"}
    sampled, whole = (jax.jit(lambda b: forward.outputs(params, b, P).logprobs)(b) for b in (rows, frozen))
    np.testing.assert_allclose(np.asarray(sampled)[mask], np.log(0.7 * np.exp(chosen) + 0.3 / V)[mask], atol=2e-6)
    np.testing.assert_allclose(np.asarray(whole)[mask], chosen[mask], atol=2e-6)


@pytest.mark.parametrize("mesh", MESHES)
def test_chosen_tokens_and_collisions_are_those_of_the_whole_distribution(logprobs: np.ndarray, mesh: str) -> None:
    forward, params = tiny_forward(MODEL, layout(mesh)), init_params(MODEL, layout(mesh), seed=0)
    needs = frozenset({"topk_logprobs", "collision", "logit_means"})
    outputs = jax.jit(lambda p, b: forward.outputs(p, b, P, needs))(params, placed(mesh))
    rows, mask = batch(), batch()["loss_mask"]
    chosen = np.take_along_axis(logprobs, rows["teacher_tokens"], axis=-1)
    np.testing.assert_allclose(np.asarray(outputs.topk_logprobs)[mask], chosen[mask], atol=2e-6)
    np.testing.assert_allclose(np.asarray(outputs.mean_logprobs)[mask], logprobs.mean(axis=-1)[mask], atol=2e-6)
    collision = np.log(np.exp(2 * logprobs.astype(np.float64)).sum(axis=-1))
    np.testing.assert_allclose(np.asarray(outputs.collision)[mask], collision[mask], atol=2e-6)


def test_whole_rows_of_logits_are_made_for_tokens_with_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """11 of 4 x 5 completion tokens have one: collisions, means and top tokens are of those, and count no others."""
    asked = []

    def counting(hidden: jax.Array, *inputs: Any, count: Any = None, **options: Any) -> Any:
        asked.append((len(hidden), None if count is None else int(count)))
        return reduce_logits_in_chunks(hidden, *inputs, count=count, **options)

    monkeypatch.setattr("rljax.forward.reduce_logits_in_chunks", counting)
    forward, params = tiny_forward(MODEL, layout()), init_params(MODEL, layout(), seed=0)
    forward.outputs(params, placed("1,1,1"), P, frozenset({"topk_logprobs", "collision", "logit_means"}))
    forward.top_k(params, placed("1,1,1"), P, K)
    assert batch()["loss_mask"].sum() == 11
    assert asked == [(4 * C, 11)] * 4


def test_a_value_is_read_where_its_token_is_predicted_and_a_score_at_the_last_token() -> None:
    scores = jnp.asarray([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    # Before token t stands token t - 1; nothing stands before token 0.
    np.testing.assert_array_equal(as_values(scores), [[0, 1, 2, 3], [0, 5, 6, 7]])
    valid = jnp.asarray([[False, True, True, False], [True, True, True, True]])
    np.testing.assert_array_equal(last_scores(scores, valid), [3, 8])
    np.testing.assert_array_equal(last_scores(scores[..., None], valid), [[3], [8]])


@pytest.mark.parametrize("mesh", MESHES)
def test_critics_and_reward_models_read_hidden_states_through_their_head(mesh: str) -> None:
    place = layout(mesh)
    forward, params = tiny_forward(SCALAR, place), init_params(SCALAR, place, seed=0)
    params = {**params, "score_bias": jnp.asarray([0.5])}
    rows = batch()
    valid = jnp.asarray(rows["valid"])
    hidden = np.asarray(
        hidden_states(SCALAR, place, params, rows["tokens"], valid.astype(jnp.int32), row_positions(valid)), np.float64
    )
    expected = hidden @ np.asarray(params["score"], np.float64)[0] + 0.5
    last = [int(np.flatnonzero(row)[-1]) for row in rows["valid"]]
    at_end = expected[np.arange(4), last]
    values, final = make_value(forward, 1)(params, placed(mesh))
    mask = rows["loss_mask"]
    np.testing.assert_allclose(np.asarray(values)[mask], np.roll(expected, 1, axis=1)[mask], atol=1e-5)
    np.testing.assert_allclose(final, at_end, atol=1e-5)
    np.testing.assert_allclose(make_reward(forward, 1)(params, placed(mesh)), at_end, atol=1e-5)


def test_a_new_scalar_head_has_the_deviation_of_the_paper_and_no_bias() -> None:
    wide = tiny_model("llama", vocab_size=V, num_hidden_layers=1, hidden_size=1024)._replace(scores=1)
    head = init_scalar_head(wide, layout(), seed=0)
    assert set(head) == {"score", "score_bias"}
    # 1,024 draws: their deviation is within 10 % of 1/sqrt(1025) = 0.0312, four of its own standard errors.
    assert abs(float(head["score"].std()) * 1025**0.5 - 1) < 0.1
    np.testing.assert_array_equal(head["score_bias"], [0])
    again = init_scalar_head(wide, layout("1,4,1"), seed=0)
    np.testing.assert_array_equal(head["score"], again["score"])


def test_a_scalar_model_has_no_output_table() -> None:
    names = set(map_params(lambda p: p.shape, declare(SCALAR)))
    assert names == {"embed", "layers", "final_norm", "score", "score_bias"}
