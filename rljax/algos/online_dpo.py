"""Online DPO (2402.04792; asynchronous, 2410.18252): DPO on the best and worst completion of each prompt.

With two completions a prompt it is the paper's. Every loss of ``dpo`` works. A pair of equal scores says nothing and
leaves the loss.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rljax.algos import dpo
from rljax.algos.base import Algorithm, Batch, rollout_batch
from rljax.algos.scores import ScoreConfig, scores_of
from rljax.types import Experience, Outputs, Term


@dataclass(frozen=True, kw_only=True)
class Config(dpo.Config, ScoreConfig):
    """DPO's settings, and what a score is worth."""


def make(config: Config, *, group_size: int, max_new_tokens: int) -> Algorithm:
    """Raises ValueError where DPO does, and for groups of one, which hold no pair."""
    if group_size == 1:
        raise ValueError("a pair is two completions of a prompt; set rollout.group_size to 2 or more")
    offline = dpo.make(config, group_size=group_size, max_new_tokens=max_new_tokens)

    def targets(state: tuple, experience: Experience) -> tuple[tuple, Batch]:
        scores = scores_of(config, experience).reshape(-1, group_size)
        best, worst = jnp.argmax(scores, axis=1), jnp.argmin(scores, axis=1)
        return state, pair_batch(experience, jnp.stack([best, worst], axis=1), best != worst)

    def loss(outputs: Outputs, batch: Batch) -> dict[str, Term]:
        return offline.loss(whole_vocabulary(outputs), batch)

    return offline._replace(targets=targets, loss=loss, rows_per_prompt=2)


def pair_batch(experience: Experience, picks: Int[Array, "p 2"], counts: Bool[Array, " p"]) -> Batch:
    """Rows 2i, chosen, and 2i + 1, rejected: the completions of prompt i that ``picks`` names. Others are masked."""

    def picked(x: Array) -> Array:
        groups = x.reshape(len(picks), -1, *x.shape[1:])
        return jax.vmap(lambda group, at: group[at])(groups, picks).reshape(-1, *x.shape[1:])

    rollout, ref_logprobs = jax.tree.map(picked, (experience.rollout, experience.ref_logprobs))
    mask = rollout.loss_mask & jnp.repeat(counts, 2)[:, None]
    return jax.lax.stop_gradient({**rollout_batch(rollout), "loss_mask": mask, "ref_logprobs": ref_logprobs})


def whole_vocabulary(outputs: Outputs) -> Outputs:
    """Log-probs of the whole vocabulary, as the reference's are, also where sampling truncates."""
    return outputs if outputs.full_logprobs is None else outputs._replace(logprobs=outputs.full_logprobs)
