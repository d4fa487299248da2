"""Divergences between student and teacher against numbers worked by hand, torch, and their limits and bounds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rljax.losses import reduce_logits_in_chunks
from rljax.losses.distillation import (
    append_rest,
    forward_kl,
    generalized_jsd,
    gkd_loss,
    reverse_kl,
    topk_divergence,
    topk_logprobs,
)

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(6)
STUDENT, TEACHER = RNG.normal(size=(2, 32, 11)) * 2

# Student (1/2, 1/2), teacher (3/4, 1/4).
S, T = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))


def test_divergences_by_hand():
    # ¾ ln(3/2) + ¼ ln(1/2) and ½ ln(2/3) + ½ ln 2
    forward, reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    np.testing.assert_allclose(forward_kl(S, T), forward, rtol=1e-5)
    np.testing.assert_allclose(reverse_kl(S, T), reverse, rtol=1e-5)
    # β = ¼: M = ¼ (¾, ¼) + ¾ (½, ½) = (9/16, 7/16)
    to_teacher = 0.75 * math.log(0.75 / (9 / 16)) + 0.25 * math.log(0.25 / (7 / 16))
    to_student = 0.5 * math.log(0.5 / (9 / 16)) + 0.5 * math.log(0.5 / (7 / 16))
    expected = 0.25 * to_teacher + 0.75 * to_student
    np.testing.assert_allclose(generalized_jsd(S, T, beta=0.25), expected, rtol=1e-4)


def torch_jsd(student, teacher, beta):
    student, teacher = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)

    def kl(p, q):
        return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if beta in (0, 1):
        return kl(teacher, student) if beta == 0 else kl(student, teacher)
    mixture = torch.log(beta * teacher.exp() + (1 - beta) * student.exp())
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_generalized_jsd_and_gradient_equal_torch(beta):
    tensor = torch.tensor(STUDENT, requires_grad=True)
    expected = torch_jsd(tensor, torch.tensor(TEACHER), beta)
    expected.sum().backward()
    with jax.enable_x64(True):
        student, teacher = jnp.asarray(STUDENT), jnp.asarray(TEACHER)
        values = generalized_jsd(student, teacher, beta=beta)
        grad = jax.grad(lambda s: jnp.sum(generalized_jsd(s, teacher, beta=beta)))(student)
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-9)
    np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-8, atol=1e-12)


def test_generalized_jsd_limits():
    """JSD_β / β → KL(T‖S) as β → 0 and JSD_β / (1-β) → KL(S‖T) as β → 1, in float64."""
    with jax.enable_x64(True):
        student, teacher = jnp.asarray(STUDENT), jnp.asarray(TEACHER)
        low = generalized_jsd(student, teacher, beta=1e-6) / 1e-6
        high = generalized_jsd(student, teacher, beta=1 - 1e-6) / 1e-6
        np.testing.assert_allclose(low, forward_kl(student, teacher), rtol=1e-3)
        np.testing.assert_allclose(high, reverse_kl(student, teacher), rtol=1e-3)


def test_equal_models_diverge_by_zero_and_have_no_gradient():
    logits = jnp.asarray(STUDENT, jnp.float32)
    for beta in (0, 0.3, 1):
        grad = jax.grad(lambda s, b=beta: jnp.sum(generalized_jsd(s, logits, beta=b)))(logits)
        np.testing.assert_allclose(generalized_jsd(logits, logits, beta=beta), 0, atol=1e-6)
        np.testing.assert_allclose(grad, 0, atol=1e-6)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_padded_vocabulary_entries_are_absent(beta):
    padding = jnp.full((32, 3), -jnp.inf)
    student, teacher = jnp.asarray(STUDENT, jnp.float32), jnp.asarray(TEACHER, jnp.float32)
    padded = [jnp.concatenate([x, padding], axis=1) for x in (student, teacher)]
    value, grad = jax.value_and_grad(lambda s: jnp.sum(generalized_jsd(s, padded[1], beta=beta)))(padded[0])
    np.testing.assert_allclose(value, jnp.sum(generalized_jsd(student, teacher, beta=beta)), rtol=1e-6)
    assert jnp.all(jnp.isfinite(grad)) and not jnp.any(grad[:, 11:])


def test_gkd_loss_by_hand_with_masked_nan():
    student = jnp.stack([S, S + 1, jnp.full(2, jnp.nan)])[None]
    teacher = jnp.stack([T, S, jnp.full(2, jnp.inf)])[None]
    mask = jnp.array([[True, True, False]])
    # Token 0 as above, token 1 equal, token 2 masked.
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    value, grad = jax.value_and_grad(gkd_loss)(student, teacher, mask, beta=0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert jnp.all(jnp.isfinite(grad)) and not jnp.any(grad[0, 2])
    assert gkd_loss(student, teacher, jnp.zeros_like(mask), beta=0.5) == 0
    # At temperature ½ the teacher's odds of 3 become 9: .9 ln(.9/.5) + .1 ln(.1/.5)
    warm = gkd_loss(student, teacher, mask, beta=0, temperature=0.5)
    np.testing.assert_allclose(warm, (0.9 * math.log(1.8) + 0.1 * math.log(0.2)) / 2, rtol=1e-5)


def test_divergences_reduce_in_chunks_from_hidden_states():
    """The head pass hands chunks of logits beside the teacher's rows: value and gradient of the whole product."""
    hidden, head = (jnp.asarray(x, jnp.float32) for x in (RNG.normal(size=(32, 5)), RNG.normal(size=(11, 5))))
    teacher = jnp.asarray(TEACHER, jnp.float32)

    def chunked(hidden):
        return jnp.sum(reduce_logits_in_chunks(hidden, head, reverse_kl, (teacher,), chunk_size=7))

    whole = jax.value_and_grad(lambda h: jnp.sum(reverse_kl(h @ head.T, teacher)))(hidden)
    for ours, expected in zip(jax.value_and_grad(chunked)(hidden), whole, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


# --- Top k ---


def teacher_top(k):
    """Ids and log-probs of the teacher's top k, in the precision of the context."""
    logprobs = np.asarray(torch.log_softmax(torch.tensor(TEACHER), -1))
    ids = np.argsort(-logprobs, axis=-1)[:, :k]
    return jnp.asarray(ids), jnp.asarray(np.take_along_axis(logprobs, ids, axis=-1), float)


def test_topk_classes_by_hand():
    # p = (1/2, 1/4, 1/8, 1/8): tokens 2 and 0, and 3/8 for the rest.
    logits = jnp.log(jnp.array([4.0, 2.0, 1.0, 1.0]))
    classes = topk_logprobs(logits, jnp.array([2, 0]))
    np.testing.assert_allclose(jnp.exp(classes), [1 / 8, 1 / 2, 3 / 8], rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(append_rest(classes[:2])), [1 / 8, 1 / 2, 3 / 8], rtol=1e-6)
    # All tokens, no rest: the last class is absent, its gradient too.
    np.testing.assert_array_equal(topk_logprobs(logits, jnp.arange(4))[4], -jnp.inf)
    assert append_rest(jax.nn.log_softmax(logits))[4] == -jnp.inf
    np.testing.assert_allclose(append_rest(jax.nn.log_softmax(logits), floored=True)[4], np.log(1e-6), rtol=1e-6)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_topk_divergence_grows_to_the_whole(divergence):
    with jax.enable_x64(True):
        student = jnp.asarray(STUDENT)
        whole = divergence(student, jnp.asarray(TEACHER))
        rows = [topk_divergence(student, *teacher_top(k), divergence) for k in (1, 4, 10, 11)]
    assert jnp.all(rows[1] >= rows[0]) and jnp.all(rows[2] >= rows[1])
    np.testing.assert_allclose(rows[3], whole, rtol=1e-9)
    assert jnp.all(rows[0] < whole)


def test_topk_forward_kl_equals_torch():
    ids, teacher = teacher_top(4)
    tensor = torch.tensor(STUDENT, requires_grad=True)
    probabilities = torch.softmax(tensor, -1).gather(-1, torch.tensor(np.asarray(ids), dtype=torch.int64))
    p = torch.tensor(np.exp(np.asarray(teacher, np.float64)))
    expected = (p * torch.log(p / probabilities)).sum(-1)
    expected = expected + (1 - p.sum(-1)) * torch.log((1 - p.sum(-1)) / (1 - probabilities.sum(-1)))
    expected.sum().backward()
    student = jnp.asarray(STUDENT, jnp.float32)
    np.testing.assert_allclose(topk_divergence(student, ids, teacher), expected.detach().numpy(), rtol=1e-4, atol=1e-6)
    grad = jax.grad(lambda s: jnp.sum(topk_divergence(s, ids, teacher)))(student)
    np.testing.assert_allclose(grad, tensor.grad.numpy(), atol=1e-5)


def test_a_teacher_renormalized_on_its_top_k_has_no_rest():
    ids, teacher = teacher_top(4)
    alone = jax.nn.log_softmax(teacher)
    value, grad = jax.value_and_grad(lambda s: jnp.sum(topk_divergence(s, ids, alone)))(
        jnp.asarray(STUDENT, jnp.float32)
    )
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(grad))
    assert jnp.all(jnp.isinf(topk_divergence(jnp.asarray(STUDENT, jnp.float32), ids, alone, reverse_kl)))
