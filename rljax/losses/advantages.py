"""Advantages of whole completions from one reward each: group, batch and running statistics, baselines, row masks.

Arrays are [b], one entry a completion; rows of one prompt share a ``group_id`` (any integers, any order) or stand
together, G at a time (``group_ids``). Take group statistics over all G rows *before* any row is dropped or masked;
batch statistics take the mask of the rows that count. Standard deviations are unbiased and get ``eps`` added to them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from rljax.losses.masked import at_least_float32, masked_mean, masked_sum, masked_var, whiten, zero_masked
from rljax.losses.returns import reward_to_go
from rljax.losses.shapes import check_shapes

PerRow = Float[Array, " b"]
GroupId = Int[Array, " b"]
RowMask = Bool[Array, " b"]


def group_ids(batch_size: int, group_size: int) -> GroupId:
    """Ids of rows in prompt-major order: 0 ... 0, 1 ... 1, each ``group_size`` times."""
    if group_size < 1 or batch_size % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {batch_size} rows of the batch; change either")
    return jnp.arange(batch_size) // group_size


@check_shapes
def group_sum(x: PerRow, group_id: GroupId) -> PerRow:
    """Sum over each row's group, repeated for each of its rows."""
    index = _group_index(group_id)
    return jax.ops.segment_sum(x, index, x.shape[0])[index]


@check_shapes
def group_max(x: PerRow, group_id: GroupId) -> PerRow:
    """Maximum over each row's group, repeated for each of its rows."""
    index = _group_index(group_id)
    return jax.ops.segment_max(x, index, x.shape[0])[index]


@check_shapes
def group_mean(rewards: PerRow, group_id: GroupId) -> PerRow:
    """Mean of each row's group; of equal rewards it is exactly that reward."""
    rewards = at_least_float32(rewards)
    top = group_max(rewards, group_id)  # sums of differences from it lose nothing where all are equal
    return top + group_sum(rewards - top, group_id) / group_sum(jnp.ones_like(rewards), group_id)


@check_shapes
def group_std(rewards: PerRow, group_id: GroupId) -> PerRow:
    """Unbiased standard deviation of each row's group; a group of one gives 0."""
    rewards = at_least_float32(rewards)
    squares = group_sum(jnp.square(rewards - group_mean(rewards, group_id)), group_id)
    return jnp.sqrt(squares / jnp.maximum(group_sum(jnp.ones_like(rewards), group_id) - 1, 1))


@check_shapes
def mixed_groups(scores: Shaped[Array, " b"], group_id: GroupId) -> RowMask:
    """True for rows whose group is not all equal: what DAPO's dynamic sampling keeps (2503.14476).

    DAPO compares correctness, so that a length penalty does not keep an all-correct group; pass total rewards for the
    other reading.
    """
    scores = at_least_float32(scores)
    return group_max(scores, group_id) > -group_max(-scores, group_id)


def _group_index(group_id: GroupId) -> Int[Array, " b"]:
    return jnp.unique(group_id, return_inverse=True, size=group_id.shape[0])[1]


class RunningMoments(NamedTuple):
    """Count, mean and sum of squared distances of everything seen; part of the checkpoint."""

    count: Float[Array, ""]  # type: ignore[assignment]  # the field hides tuple.count
    mean: Float[Array, ""]
    m2: Float[Array, ""]


def empty_moments() -> RunningMoments:
    """Nothing seen yet. In float32, in float64 where JAX has it enabled: merging does not change the type."""
    return RunningMoments(*(jnp.zeros(()) for _ in range(3)))


@check_shapes
def moments_of(x: Float[Array, "*s"], mask: Bool[Array, "*s"]) -> RunningMoments:
    """Moments of the kept entries."""
    x = at_least_float32(x)
    mean = masked_mean(x, mask)
    return RunningMoments(
        jnp.sum(mask).astype(x.dtype), mean, masked_sum(jnp.square(zero_masked(mask, x) - mean), mask)
    )


@check_shapes
def merge_moments(a: RunningMoments, b: RunningMoments) -> RunningMoments:
    """Moments of both samples together (Chan, Golub and LeVeque 1979); any split gives the same."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    delta = b.mean - a.mean
    return RunningMoments(count, a.mean + delta * share, a.m2 + b.m2 + jnp.square(delta) * a.count * share)


@check_shapes
def running_std(moments: RunningMoments) -> Float[Array, ""]:
    """Unbiased; 0 before the second value."""
    return jnp.sqrt(moments.m2 / jnp.maximum(moments.count - 1, 1))


@check_shapes
def batch_mean(rewards: PerRow, mask: RowMask) -> Float[Array, ""]:
    """Mean over the rows that count."""
    return masked_mean(rewards, mask)


@check_shapes
def batch_std(rewards: PerRow, mask: RowMask) -> Float[Array, ""]:
    """Unbiased standard deviation of the *raw* rewards that count (Lite PPO, 2508.08221), not of centred ones."""
    return jnp.sqrt(masked_var(rewards, mask, ddof=1))


MEANS = {
    "group": lambda rewards, group_id, mask, moments: group_mean(rewards, group_id),
    "batch": lambda rewards, group_id, mask, moments: batch_mean(rewards, mask),
    "running": lambda rewards, group_id, mask, moments: moments.mean,
    "none": lambda rewards, group_id, mask, moments: 0.0,
}
SCALES = {
    "group": lambda rewards, group_id, mask, moments, eps: group_std(rewards, group_id) + eps,
    "batch": lambda rewards, group_id, mask, moments, eps: batch_std(rewards, mask) + eps,
    "running": lambda rewards, group_id, mask, moments, eps: running_std(moments) + eps,
    "none": lambda rewards, group_id, mask, moments, eps: 1.0,
}


@check_shapes
def normalize_rewards(
    rewards: PerRow,
    group_id: GroupId,
    mask: RowMask,
    *,
    mean: str,
    std: str,
    moments: RunningMoments | None = None,
    eps: float = 1e-6,
) -> PerRow:
    """``(r - mean) / (std + eps)``, each of them from "group", "batch", "running" or "none" (2508.08221, section 4).

    group/group is GRPO, group/none Dr. GRPO, group/batch Lite PPO, running/running PPO-max before its clip. ``mask``
    holds the rows of kept groups and matters to batch statistics only. Update ``moments`` with these rewards first.
    """
    for name, choice in (("mean", mean), ("std", std)):
        if choice not in MEANS:
            raise ValueError(f"normalize_rewards got {name}={choice!r}; choose one of {', '.join(MEANS)}")
    if moments is None and "running" in (mean, std):
        raise ValueError("normalize_rewards needs moments where mean or std is 'running'; pass a RunningMoments")
    rewards = at_least_float32(rewards)
    centred = rewards - MEANS[mean](rewards, group_id, mask, moments)
    return centred / SCALES[std](rewards, group_id, mask, moments, eps)


@check_shapes
def leave_one_out(rewards: PerRow, group_id: GroupId) -> PerRow:
    """``G/(G-1) · (r - mean)``: reward less the others' mean (RLOO, 2402.14740); a group of one gives 0."""
    rewards = at_least_float32(rewards)
    size = group_sum(jnp.ones_like(rewards), group_id)
    return (rewards - group_mean(rewards, group_id)) * size / jnp.maximum(size - 1, 1)


@check_shapes
def remax(rewards: Float[Array, "*s"], greedy_rewards: Float[Array, "*#s"]) -> Float[Array, "*s"]:
    """Reward less that of the greedy completion of the same prompt (2310.10505, algorithm 1)."""
    return at_least_float32(rewards) - greedy_rewards


@check_shapes
def opo_baseline(rewards: PerRow, lengths: Int[Array, " b"], group_id: GroupId) -> PerRow:
    """``Σ |o| r / Σ |o|`` of each row's group, to be subtracted (OPO, 2505.23585); a group without tokens gives 0."""
    rewards = at_least_float32(rewards)
    lengths = lengths.astype(rewards.dtype)
    return group_sum(rewards * lengths, group_id) / jnp.maximum(group_sum(lengths, group_id), 1)


@check_shapes
def gpg_advantages(rewards: PerRow, group_id: GroupId) -> PerRow:
    """``α (r - mean)``, α = rows over rows of mixed groups (GPG, 2504.02546); for ``reinforce``. All equal gives 0."""
    mixed = jnp.sum(mixed_groups(rewards, group_id))
    return (at_least_float32(rewards) - group_mean(rewards, group_id)) * (rewards.shape[0] / jnp.maximum(mixed, 1))


@check_shapes
def reinforce_plus_plus(
    token_rewards: Float[Array, "b t"], mask: Bool[Array, "b t"], *, gamma: float = 1.0
) -> Float[Array, "b t"]:
    """Reward-to-go of KL-shaped token rewards, whitened over all kept tokens of the batch (2501.03262)."""
    return whiten(reward_to_go(token_rewards, mask, gamma=gamma), mask)


@check_shapes
def reinforce_plus_plus_baseline(rewards: PerRow, group_id: GroupId, mask: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """``r - group mean`` on every token, whitened over all kept tokens of the batch (2501.03262, baseline form)."""
    centred = at_least_float32(rewards) - group_mean(rewards, group_id)
    return whiten(broadcast_to_tokens(centred, mask), mask)


@check_shapes
def broadcast_to_tokens(advantages: PerRow, mask: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """Each row's number on each of its kept tokens, 0 elsewhere."""
    return jnp.where(mask, at_least_float32(advantages)[:, None], 0)


class PercentileScale(NamedTuple):
    """``spread``: the moving average of P95 - P5 of the returns; ``updates`` so far. Part of the checkpoint."""

    spread: Float[Array, ""]
    updates: Int[Array, ""]


def empty_percentile_scale() -> PercentileScale:
    """Nothing seen yet."""
    return PercentileScale(jnp.zeros(()), jnp.zeros((), jnp.int32))


@check_shapes
def update_percentile_scale(
    state: PercentileScale, returns: Float[Array, "*s"], mask: Bool[Array, "*s"], *, decay: float = 0.99
) -> PercentileScale:
    """Moving average, seeded by its first value and not by 0 (DreamerV3, 2301.04104); an empty mask changes nothing."""
    kept = jnp.where(mask, at_least_float32(returns), jnp.nan)
    low, high = jnp.nanpercentile(kept, jnp.array([5.0, 95.0]))
    spread = jnp.where(state.updates == 0, high - low, decay * state.spread + (1 - decay) * (high - low))
    new = PercentileScale(spread, state.updates + 1)
    return jax.tree.map(lambda x, old: jnp.where(jnp.any(mask), x, old), new, state)


@check_shapes
def scale_by_percentile(advantages: Float[Array, "*s"], state: PercentileScale) -> Float[Array, "*s"]:
    """``A / max(1, spread)``: shrinks large returns, leaves small ones (2301.04104). Whitening would undo it."""
    return at_least_float32(advantages) / jnp.maximum(state.spread, 1)


@check_shapes
def soft_overlong_penalty(
    lengths: Int[Array, " b"], *, max_tokens: int, buffer_tokens: int, factor: float = 1.0
) -> PerRow:
    """0 up to ``max - buffer`` tokens, then falling to ``-factor`` at ``max``; for the reward (2503.14476, eq. 13)."""
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens is {buffer_tokens}; it must be at least 1 and at most max_tokens={max_tokens}")
    return factor * jnp.clip((max_tokens - buffer_tokens - at_least_float32(lengths)) / buffer_tokens, -1, 0)


@check_shapes
def mask_truncated(mask: Bool[Array, "b t"], truncated: RowMask) -> Bool[Array, "b t"]:
    """The loss mask without rows that ran out of budget (DAPO's overlong filter); they stay in the group statistics."""
    return mask & ~truncated[:, None]
