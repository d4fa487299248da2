"""Distillation: exact divergences from a teacher on whole rows of logits, or on its top k with the rest as one class.

Rows of logits [*n, v] are chunks of a head pass (``reduce_logits_in_chunks``); divergences are in nats a token and to
be minimised. They take no mask, the ``_loss`` form does. Logits of -inf count as absent.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.losses.kl import full_kl, jensen_shannon
from rljax.losses.logprobs import log_normalizer
from rljax.losses.masked import at_least_float32, masked_mean, zero_masked
from rljax.losses.shapes import check_shapes


@check_shapes
def forward_kl(student_logits: Float[Array, "*n v"], teacher_logits: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """``KL(T‖S)``, the cross-entropy with soft labels less their entropy (1503.02531, without its τ²)."""
    return full_kl(teacher_logits, student_logits)


@check_shapes
def reverse_kl(student_logits: Float[Array, "*n v"], teacher_logits: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """``KL(S‖T)``, mode-seeking (MiniLLM, 2306.08543, eq. 1, token by token)."""
    return full_kl(student_logits, teacher_logits)


@check_shapes
def generalized_jsd(
    student_logits: Float[Array, "*n v"], teacher_logits: Float[Array, "*n v"], *, beta: float
) -> Float[Array, "*n"]:
    """GKD: ``β KL(T‖M) + (1−β) KL(S‖M)``, M = βT + (1−β)S (2306.13649, eq. 1).

    β = 0 is ``forward_kl`` and β = 1 ``reverse_kl``, its limits once divided by β and by 1−β.
    """
    if beta == 0:
        return forward_kl(student_logits, teacher_logits)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits)
    return jensen_shannon(teacher_logits, student_logits, weight=beta)


@check_shapes
def gkd_loss(
    student_logits: Float[Array, "b t v"],
    teacher_logits: Float[Array, "b t v"],
    loss_mask: Bool[Array, "b t"],
    *,
    beta: float,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """``generalized_jsd`` of logits/temperature, mean over tokens; an empty mask gives 0 (2306.13649, eq. 1).

    ``logits[:, t]`` predict token t. Holds whole rows for all tokens: for large vocabularies reduce in chunks instead.
    """
    student, teacher = zero_masked(loss_mask[..., None], student_logits, teacher_logits)
    return masked_mean(generalized_jsd(student / temperature, teacher / temperature, beta=beta), loss_mask)


# --- A teacher known by its top k ---

SMALLEST_REST = 1e-6  # under it lies only the rounding of the sum


@check_shapes
def topk_logprobs(logits: Float[Array, "*n v"], token_ids: Int[Array, "*n k"]) -> Float[Array, "*n k+1"]:
    """The student's log-probs of ``token_ids``, and last of all other tokens together. Ids of a row must differ."""
    logits = at_least_float32(logits)
    chosen = jnp.take_along_axis(logits, token_ids, axis=-1)
    others = jnp.put_along_axis(logits, token_ids, -jnp.inf, axis=-1, inplace=False)
    some = ~jnp.all(jnp.isneginf(others), axis=-1, keepdims=True)
    rest = jnp.where(some, log_normalizer(jnp.where(some, others, 0))[..., None], -jnp.inf)
    return jnp.concatenate([chosen, rest], axis=-1) - log_normalizer(logits)[..., None]


@check_shapes
def append_rest(logprobs: Float[Array, "*n k"], *, floored: bool = False) -> Float[Array, "*n k+1"]:
    """A teacher's top-k log-probs, and last that of all other tokens: ``log(1 − Σ p)``, -inf below 1e-6.

    ``floored``: log 1e-6 below it. Both sides floored have finite divergences, whichever is the surer of its top k.
    """
    logprobs = at_least_float32(logprobs)
    rest = 1 - jnp.sum(jnp.exp(logprobs), axis=-1, keepdims=True)
    some = rest >= SMALLEST_REST
    absent = math.log(SMALLEST_REST) if floored else -jnp.inf
    return jnp.concatenate([logprobs, jnp.where(some, jnp.log(jnp.where(some, rest, 1)), absent)], axis=-1)


@check_shapes
def topk_divergence(
    student_logits: Float[Array, "*n v"],
    token_ids: Int[Array, "*n k"],
    teacher_logprobs: Float[Array, "*n k"],
    divergence: Callable[[Array, Array], Array] = forward_kl,
) -> Float[Array, "*n"]:
    """A divergence between student and teacher on k + 1 classes: the teacher's top k and the rest.

    At most the divergence on the whole vocabulary, equal at k = v. A teacher renormalised on its top k has no rest:
    ``forward_kl`` then ignores it and ``reverse_kl`` is infinite.
    """
    return divergence(topk_logprobs(student_logits, token_ids), append_rest(teacher_logprobs))
