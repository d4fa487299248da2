"""Scored rollouts as tables: two prompt columns, then completions of given lengths."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from rljax.types import FINISH_END, FINISH_LENGTH, Experience, Rollout


def experience(
    rewards: list[float], mask: Any, *, finished: list[bool] | None = None, behavior: Any = -1.0, **scored: Any
) -> Experience:
    """``mask`` is [b c], or the lengths of the rows. Per-token numbers are the completion's; the rest is NaN."""
    rows = len(rewards)
    mask = np.asarray(mask)
    if mask.ndim == 1:
        mask = np.arange(mask.max()) < mask[:, None]
    mask = np.concatenate([np.zeros((rows, 2), bool), mask.astype(bool)], axis=1)

    def placed(x: Any) -> np.ndarray:
        x = np.asarray(x, float)
        whole = np.full((*mask.shape, *x.shape[2:]), np.nan)
        whole[:, 2:] = x
        whole[~mask] = np.nan
        return jnp.asarray(whole)

    reasons = [FINISH_END if f else FINISH_LENGTH for f in finished or [True] * rows]
    rollout = Rollout(
        tokens=jnp.ones(mask.shape, jnp.int32),
        valid=jnp.asarray(mask | (np.arange(mask.shape[1]) < 2)),
        loss_mask=jnp.asarray(mask),
        behavior_logprobs=placed(behavior),
        support=jnp.full(mask.shape, -jnp.inf),
        finish_reason=jnp.asarray(reasons),
        prompt_id=jnp.arange(rows),
        sample_id=jnp.zeros(rows, jnp.int32),
        group_id=jnp.arange(rows),
        step_version=jnp.zeros(rows, jnp.int32),
    )
    per_token = ("ref_logprobs", "proximal_logprobs", "values", "ema_values")
    per_token += ("dense_rewards", "guide_logprobs", "teacher_logprobs")
    scored = {name: placed(x) if name in per_token else jnp.asarray(x) for name, x in scored.items()}
    numbers = jnp.asarray(rewards, float)
    return Experience(rollout, numbers, numbers > 0, **scored)


def completion(x: Any) -> np.ndarray:
    """A per-token column without the prompt's part."""
    return np.asarray(x)[:, 2:]


def on_completion(x: Any) -> jnp.ndarray:
    """Numbers of the completion's tokens as a column; NaN stands where nothing may read."""
    x = np.asarray(x, float)
    return jnp.asarray(np.concatenate([np.full((x.shape[0], 2, *x.shape[2:]), np.nan), x], axis=1))
