"""On-policy distillation on tables: a vocabulary of four, its whole or its top two."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos import distillation
from rljax.losses.distillation import gkd_loss, topk_divergence
from rljax.types import Experience, Outputs
from tests.algos.rollouts import experience, on_completion
from tests.algos.tables import terms_of

RNG = np.random.default_rng(3)
STUDENT, TEACHER = RNG.normal(size=(2, 2, 3, 4))
LENGTHS = [3, 1]


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def rollout(k: int) -> Experience:
    tokens = np.argsort(-TEACHER, axis=-1)[..., :k]
    return experience([0.0, 0.0], LENGTHS)._replace(
        teacher_tokens=jnp.asarray(np.pad(tokens, ((0, 0), (2, 0), (0, 0)))),
        teacher_logprobs=on_completion(np.take_along_axis(log_softmax(TEACHER), tokens, axis=-1)),
    )


def loss(beta: float, k: int) -> Any:
    algo = distillation.make(distillation.Config(beta=beta), group_size=1, max_new_tokens=4)
    batch = algo.targets((), rollout(k))[1]
    chosen = np.asarray(batch["teacher_tokens"])[:, 2:]
    student = on_completion(np.take_along_axis(log_softmax(STUDENT), chosen, axis=-1))
    return algo, batch, student


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_whole_vocabulary_gives_gkd(beta: float) -> None:
    algo, batch, student = loss(beta, 4)
    mask = np.arange(3) < np.asarray(LENGTHS)[:, None]
    expected = gkd_loss(jnp.asarray(STUDENT), jnp.asarray(TEACHER), jnp.asarray(mask), beta=beta)
    got = terms_of(algo, Outputs(topk_logprobs=student), batch)
    np.testing.assert_allclose(got["total"], expected, rtol=1e-5)


def test_the_top_two_and_the_rest_are_three_classes() -> None:
    algo, batch, student = loss(0.0, 2)
    each = topk_divergence(jnp.asarray(STUDENT), batch["teacher_tokens"][:, 2:], batch["teacher_logprobs"][:, 2:])
    expected = (each[0].sum() + each[1, 0]) / 4
    got = terms_of(algo, Outputs(topk_logprobs=student), batch)
    np.testing.assert_allclose(got["total"], expected, rtol=1e-5)
    gradient = jax.grad(lambda x: terms_of(algo, Outputs(topk_logprobs=x), batch)["total"])(student)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[1, 3:].any()


@pytest.mark.parametrize("sure", ["student", "teacher"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_model_that_is_sure_of_its_top_k_gives_a_finite_loss(beta: float, sure: str) -> None:
    """One side leaves less than 1e-6 to other tokens, the other side half of its mass: at most ln 1e6 nats."""
    algo, batch, student = loss(beta, 2)
    certain = np.log([1 - 1e-9, 5e-10]).astype(np.float32)
    unsure = np.log([0.25, 0.25]).astype(np.float32)
    student = jnp.broadcast_to(certain if sure == "student" else unsure, student.shape)
    batch["teacher_logprobs"] = jnp.broadcast_to(unsure if sure == "student" else certain, student.shape)
    value, gradient = jax.value_and_grad(lambda x: terms_of(algo, Outputs(topk_logprobs=x), batch)["total"])(student)
    assert 0 < value < np.log(1e6) + np.log(1e9) and np.isfinite(gradient).all()


def test_it_reads_no_reward() -> None:
    algo = loss(0.5, 2)[0]
    assert not algo.rewarded and algo.needs == {"teacher_topk"}
    with pytest.raises(ValueError, match=r"beta is 1\.5"):
        distillation.make(distillation.Config(beta=1.5), group_size=1, max_new_tokens=4)
