"""KTO (2402.01306): completions marked desirable or not, against the mean log-ratio of mismatched ones."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from rljax.algos.base import Algorithm, Batch, no_state
from rljax.losses.logprobs import sequence_logprobs
from rljax.losses.masked import count_sequences, masked_sum
from rljax.losses.preferences import sequence_log_ratio
from rljax.losses.unpaired import kto, kto_reference_point
from rljax.types import Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config:
    beta: float  # KL coefficient
    desirable_weight: float = 1.0  # λ_D; the paper recommends λ_D·n_D / (λ_U·n_U) in [1, 4/3]
    undesirable_weight: float = 1.0  # λ_U


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    def prepare(state: tuple, batch: Batch, key: Array) -> tuple[tuple, Batch, dict]:
        """Even rows are (x_i, y_i), odd rows (x_i, y_{i+1}): the latter give z0, of the whole step, and are dropped."""
        mask = batch["loss_mask"][1::2]
        current, reference = (batch[name][1::2] for name in ("current_logprobs", "ref_logprobs"))
        z0 = kto_reference_point(
            sequence_logprobs(current, mask), sequence_logprobs(reference, mask), jnp.any(mask, axis=-1)
        )
        batch = {name: array[0::2] for name, array in batch.items()}
        batch["reference_point"] = jnp.broadcast_to(z0, batch["scores"].shape)
        return state, batch, labelled_counts(batch)

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        assert outputs.logprobs is not None
        mask = batch["loss_mask"]
        rows = jnp.any(mask, axis=-1)
        policy, reference = sequence_logprobs(outputs.logprobs, mask), sequence_logprobs(batch["ref_logprobs"], mask)
        losses = kto(
            policy,
            reference,
            batch["scores"] > 0,
            batch["reference_point"],
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        rewards = config.beta * sequence_log_ratio(policy, reference)
        return {
            "preference": Term(masked_sum(losses, rows), "rows"),
            "reference_point": Term(masked_sum(config.beta * batch["reference_point"], rows), "rows", 0.0),
            **labelled_metrics(rewards, batch),
        }

    needs = frozenset({"ref_logprobs", "current_logprobs"})
    return Algorithm(needs, no_state, targets=None, prepare=prepare, loss=loss, rows="labelled", unit=2)


def labelled_counts(batch: Batch) -> dict[str, Array]:
    """Rows that keep a token, of both labels and of each."""
    mask, desirable = batch["loss_mask"], (batch["scores"] > 0)[:, None]
    masks = {"rows": mask, "desirable": mask & desirable, "undesirable": mask & ~desirable}
    return {name: count_sequences(kept) for name, kept in masks.items()}


def labelled_metrics(rewards: Array, batch: Batch) -> dict[str, Term]:
    """Mean implicit reward of either label."""
    rows, desirable = jnp.any(batch["loss_mask"], axis=-1), batch["scores"] > 0
    return {
        "reward_desirable": Term(masked_sum(rewards, rows & desirable), "desirable", 0.0),
        "reward_undesirable": Term(masked_sum(rewards, rows & ~desirable), "undesirable", 0.0),
    }
