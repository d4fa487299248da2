"""Supervised fine-tuning: cross entropy on completion tokens, with optional smoothing, z-loss and DFT."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.losses.masked import count_tokens, masked_sum, zero_masked
from rljax.losses.supervised import dft
from rljax.types import Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tokens weigh alike, over the whole optimizer step."""

    loss: Literal["nll", "dft"] = "nll"  # dft: cross entropy weighted by the probability (2508.05629)
    label_smoothing: float = 0.0  # weight of a uniform target (1512.00567)
    z_loss_coef: float = 0.0  # weight of the squared log normaliser of the logits; 1e-4 in its paper (2204.02311)
    reduction: Literal["token_mean", "token_sum"] = "token_mean"  # Tülu 3 (2411.15124) uses the sum


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError on a label smoothing outside [0, 1), or of DFT."""
    smoothing = config.label_smoothing
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing is {smoothing}; give one in [0, 1)")
    if smoothing and config.loss == "dft":
        raise ValueError("dft reads no label_smoothing; leave one out")
    over = "tokens" if config.reduction == "token_mean" else "one"

    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        return state, batch, {"tokens": count_tokens(batch["loss_mask"]), "one": jnp.float32(1)}

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.logprobs is not None
        mask = batch["loss_mask"]
        nll = Term(-masked_sum(outputs.logprobs, mask), over, 1 - smoothing)
        terms = {"nll": nll}
        if config.loss == "dft":
            weighted = masked_sum(dft(zero_masked(mask, outputs.logprobs)), mask)
            terms = {"nll": nll._replace(coef=0.0), "dft": Term(weighted, over)}
        if outputs.mean_logprobs is not None and outputs.log_normalizers is not None:
            terms["uniform_nll"] = Term(-masked_sum(outputs.mean_logprobs, mask), over, smoothing)
            terms["z_loss"] = Term(masked_sum(jnp.square(outputs.log_normalizers), mask), over, config.z_loss_coef)
        return terms

    needs = frozenset({"logit_means"} if smoothing or config.z_loss_coef else set())
    return Algorithm(needs=needs, init=no_state, targets=None, prepare=prepare, loss=loss)
