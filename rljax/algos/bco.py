"""BCO (2404.04656): a binary classifier of single completions, shifted by the running mean of its rewards."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch
from rljax.algos.kto import labelled_counts, labelled_metrics
from rljax.losses.advantages import RunningMoments, empty_moments, merge_moments, moments_of
from rljax.losses.logprobs import sequence_logprobs
from rljax.losses.masked import masked_sum
from rljax.losses.preferences import sequence_log_ratio
from rljax.losses.unpaired import bco
from rljax.types import Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config:
    beta: float  # KL coefficient


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    def prepare(moments: RunningMoments, batch: Batch, key: Array) -> tuple[RunningMoments, Batch, dict]:
        """δ is the mean reward of all rows so far, this step's included."""
        mask = batch["loss_mask"]
        policy, reference = (sequence_logprobs(batch[name], mask) for name in ("current_logprobs", "ref_logprobs"))
        rewards = config.beta * sequence_log_ratio(policy, reference)
        moments = merge_moments(moments, moments_of(rewards, jnp.any(mask, axis=-1)))
        batch = {**batch, "shift": jnp.broadcast_to(moments.mean, rewards.shape)}
        return moments, batch, labelled_counts(batch)

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.logprobs is not None
        mask = batch["loss_mask"]
        rows = jnp.any(mask, axis=-1)
        policy, reference = sequence_logprobs(outputs.logprobs, mask), sequence_logprobs(batch["ref_logprobs"], mask)
        losses = bco(policy, reference, batch["scores"] > 0, batch["shift"], beta=config.beta)
        rewards = config.beta * sequence_log_ratio(policy, reference)
        return {
            "preference": Term(masked_sum(losses, rows), "rows"),
            "shift": Term(masked_sum(batch["shift"], rows), "rows", 0.0),
            **labelled_metrics(rewards, batch),
        }

    needs = frozenset({"ref_logprobs", "current_logprobs"})
    return Algorithm(needs, empty_moments, targets=None, prepare=prepare, loss=loss, rows="labelled", unit=1)
