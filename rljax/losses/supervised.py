"""Supervised losses: cross-entropy with a separable denominator, label smoothing, z-loss, dynamic fine-tuning.

Functions of single tokens take no mask: pass their inputs through ``zero_masked`` first, or use a ``_loss`` form.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.losses.logprobs import log_normalizer, token_logprobs
from rljax.losses.masked import at_least_float32, count_tokens, masked_mean, masked_sum, zero_masked
from rljax.losses.shapes import check_shapes


@check_shapes
def cross_entropy(
    logprobs: Float[Array, "b t"], loss_mask: Bool[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``−Σ l`` and the number of tokens, to add over micro-batches and devices before dividing (2203.02155, SFT).

    Tülu 3 (2411.15124) minimises the numerator alone. An empty mask gives 0 and 0.
    """
    return -masked_sum(logprobs, loss_mask), count_tokens(loss_mask)


@check_shapes
def sft_loss(logprobs: Float[Array, "b t"], loss_mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    """``−mean l`` over the batch's tokens: ``cross_entropy`` in one call (2203.02155); an empty mask gives 0."""
    return -masked_mean(logprobs, loss_mask)


@check_shapes
def smoothed_cross_entropy(
    logits: Float[Array, "*n v"], tokens: Int[Array, "*n"], *, label_smoothing: float
) -> Float[Array, "*n"]:
    """``−(1−ε) log p_y − ε mean_v log p_v`` per token (1512.00567, section 7); logits of -inf count as absent."""
    return -(1 - label_smoothing) * token_logprobs(logits, tokens) - label_smoothing * mean_logprob(logits)


@check_shapes
def mean_logprob(logits: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """``mean_v log p_v``, what label smoothing adds (1512.00567, section 7); logits of -inf count as absent."""
    logits = at_least_float32(logits)
    present = ~jnp.isneginf(logits)
    mean_logit = jnp.sum(jnp.where(present, logits, 0), axis=-1) / jnp.sum(present, axis=-1)
    return mean_logit - log_normalizer(logits)


@check_shapes
def z_loss(logits: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """``log² Z``, Z = Σ_v e^{logit_v}, per token; its paper adds 1e-4 times it (2204.02311, section 5)."""
    return jnp.square(log_normalizer(logits))


@check_shapes
def dft(logprobs: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """DFT: ``−sg(p)·log p`` per token, with the gradient of −p (2508.05629, token-level form)."""
    logprobs = at_least_float32(logprobs)
    return -jax.lax.stop_gradient(jnp.exp(logprobs)) * logprobs


@check_shapes
def dft_loss(logprobs: Float[Array, "b t"], loss_mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    """``dft``, mean over the tokens of the batch (2508.05629). An empty mask gives 0."""
    return masked_mean(dft(zero_masked(loss_mask, logprobs)), loss_mask)
