"""Reward models of answers and of prefixes on tables of scores."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos import prefix_reward_model, reward_model
from rljax.algos.base import Algorithm, Batch
from rljax.types import Outputs
from tests.algos.tables import terms_of

SIZES: dict[str, Any] = {"group_size": 1, "max_new_tokens": 1}


def make(loss: Any, **options: Any) -> Algorithm:
    return reward_model.make(reward_model.Config(loss=loss, **options), **SIZES)


def answers(rewards: list[float], scores: list[float], missing: tuple[int, ...] = ()) -> tuple[Outputs, Batch]:
    """Rewards at the last of two tokens; NaN behind it, another number before it and where an answer is missing."""
    rows = len(rewards)
    mask = np.tile([False, True, True, False], (rows, 1))
    mask[list(missing)] = False
    table = jnp.asarray([[7.0, 8.0, reward, jnp.nan] for reward in rewards])
    valid = ~np.isin(np.arange(rows), missing)
    return Outputs(scores=table), {"loss_mask": mask, "scores": np.asarray(scores), "answer_valid": valid}


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_bradley_terry_by_hand() -> None:
    """Gaps 2 and -1, and a pair without a rejected answer: (log(1 + e^-2) + log(1 + e)) / 2."""
    rows = answers([3, 1, 0, 1, 9, 9], [1, 0, 1, 0, 1, 0], missing=(5,))
    terms = terms_of(make("bradley_terry"), *rows)
    np.testing.assert_allclose(terms["total"], (softplus(-2) + softplus(1)) / 2, rtol=1e-6)
    np.testing.assert_allclose(terms["margin"], (2 - 1) / 2)
    np.testing.assert_allclose(terms["accuracy"], 1 / 2)
    np.testing.assert_allclose(terms["confidence"], (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-1))) / 2, rtol=1e-6)
    np.testing.assert_allclose(terms["score"], (3 + 1 + 0 + 1 + 9) / 5)


def test_margin_and_centering_by_hand() -> None:
    """Scores 5 and 2 ask for a gap of .5 * 3; .1 * (3 + 1)² and .1 * (0 + 1)² keep rewards around 0."""
    rows = answers([3, 1, 0, 1], [5, 2, 1, 1])
    terms = terms_of(make("bradley_terry", margin_coef=0.5, centering_coef=0.1), *rows)
    np.testing.assert_allclose(terms["total"], (softplus(1.5 - 2) + 1.6 + softplus(1) + 0.1) / 2, rtol=1e-6)
    np.testing.assert_allclose(terms["accuracy"], 1 / 2)  # a pair of equal scores is a pair


RANKED = answers([0, 2, 1, 5, 3, 9], [1, 3, 2, 8, 9, 0], missing=(5,))  # best first: 2, 1, 0 and 3, 5


def test_plackett_luce_by_hand() -> None:
    """log(e^2 + e + 1) - 2 + log(e + 1) - 1, and log(e^3 + e^5) - 3 for the ranking of two; over two rankings."""
    first = math.log(math.exp(2) + math.e + 1) - 2 + math.log(math.e + 1) - 1
    second = math.log(math.exp(3) + math.exp(5)) - 3
    terms = terms_of(make("plackett_luce", answers=3), *RANKED)
    np.testing.assert_allclose(terms["total"], (first + second) / 2, rtol=1e-6)
    np.testing.assert_allclose(terms["accuracy"], 3 / 4)
    np.testing.assert_allclose(terms["margin"], (1 + 2 + 1 - 2) / 4)


def test_pairwise_split_by_hand() -> None:
    """(2 log(1 + 1/e) + log(1 + e^-2)) / C(3, 2), and one pair of gap -2."""
    terms = terms_of(make("pairwise_split", answers=3), *RANKED)
    expected = ((2 * softplus(-1) + softplus(-2)) / 3 + softplus(2)) / 2
    np.testing.assert_allclose(terms["total"], expected, rtol=1e-6)


@pytest.mark.parametrize("loss", ["plackett_luce", "pairwise_split"])
def test_two_answers_are_bradley_terry(loss: str) -> None:
    rewards = np.random.default_rng(0).normal(size=16).tolist()
    rows = answers(rewards, [1.0, 0.0] * 8)
    pairs, ranked = (terms_of(make(name), *rows) for name in ("bradley_terry", loss))
    assert pairs.keys() == ranked.keys()
    np.testing.assert_allclose(list(ranked.values()), list(pairs.values()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce", "pairwise_split"])
def test_micro_batches_add_up_and_gradients_are_finite(loss: str) -> None:
    k = 2 if loss == "bradley_terry" else 4
    rng = np.random.default_rng(1)
    outputs, batch = answers(rng.normal(size=8 * k).tolist(), rng.normal(size=8 * k).tolist(), missing=(3, 2 * k - 1))
    algorithm = make(loss, answers=k)
    whole, cut = (terms_of(algorithm, outputs, batch, pieces=n) for n in (1, 4))
    np.testing.assert_allclose(list(cut.values()), list(whole.values()), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: terms_of(algorithm, Outputs(scores=x), batch)["total"])(outputs.scores)
    assert np.isfinite(gradient).all()
    assert (gradient[:, [0, 1, 3]] == 0).all()  # the score stands at the last token


def test_what_they_read() -> None:
    for loss, rows, k in (("bradley_terry", "pairs", 2), ("plackett_luce", "ranked", 4)):
        algorithm = make(loss, answers=k)
        assert (algorithm.rows, algorithm.unit, algorithm.trains) == (rows, k, ("reward_model",))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss": "bradley_terry", "answers": 3}, "bradley_terry compares 2 answers, not 3"),
        ({"loss": "plackett_luce", "margin_coef": 1.0}, "plackett_luce reads no margin_coef"),
    ],
)
def test_options_that_the_loss_does_not_read_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make(**options)


# -- prefixes

PREFIX = prefix_reward_model.make(prefix_reward_model.Config(), **SIZES)


def test_outcomes_and_steps_by_hand() -> None:
    """Row 1: every token is labelled right. Row 2: two steps end, the second is wrong."""
    logits = jnp.array([[jnp.nan, 0.0, 2.0], [1.0, jnp.nan, 1.0]])
    mask = np.array([[False, True, True], [True, False, True]])
    labels = np.array([[np.nan, 1, 1], [1, np.nan, 0]])
    batch = {"loss_mask": mask, "labels": labels, "label_mask": mask}
    terms = terms_of(PREFIX, Outputs(scores=logits), batch)
    expected = (math.log(2) + softplus(-2) + softplus(-1) + softplus(1)) / 4
    np.testing.assert_allclose(terms["total"], expected, rtol=1e-6)
    np.testing.assert_allclose(terms["accuracy"], 2 / 4)
    np.testing.assert_allclose(terms["label"], 3 / 4)
    gradient = jax.grad(lambda x: terms_of(PREFIX, Outputs(scores=x), batch)["total"])(logits)
    np.testing.assert_allclose(gradient[0], [0, -0.5 / 4, -(1 - 1 / (1 + math.exp(-2))) / 4], rtol=1e-6)


def test_an_outcome_model_ranks_synthetic_answers() -> None:
    """A linear head on prefixes that carry a noisy sign of the outcome: AUC of at least .9 at the last token."""
    rng = np.random.default_rng(0)
    rows, length, width = 400, 6, 4
    correct = rng.random(rows) < 0.5
    features = rng.normal(size=(rows, length, width))
    features[:, :, 0] += 1.5 * (2 * correct[:, None] - 1) * np.linspace(0.2, 1.0, length)
    labels = np.broadcast_to(correct[:, None], (rows, length)).astype(np.float32)
    mask = np.ones((rows, length), bool)

    def loss(head: jax.Array, chosen: slice) -> jax.Array:
        batch = {"loss_mask": mask[chosen], "labels": labels[chosen], "label_mask": mask[chosen]}
        return terms_of(PREFIX, Outputs(scores=jnp.asarray(features[chosen]) @ head), batch)["total"]

    head, train, held_out = jnp.zeros(width), slice(0, 300), slice(300, 400)
    step = jax.jit(lambda head: head - jax.grad(loss)(head, train))
    for _ in range(50):
        head = step(head)
    final = features[held_out, -1] @ np.asarray(head)
    right, wrong = final[correct[held_out]], final[~correct[held_out]]
    assert np.mean(right[:, None] > wrong[None, :]) >= 0.9
