"""Token rewards and what follows from them over time: reward-to-go, n-step returns, GAE, V-trace.

Arrays are [b, t]. A mask may have gaps (tool output, several turns): each recursion carries what it knows of the next
kept token across them unchanged, so a row with a gap gives the numbers of the row without it. Masked entries of every
result are 0 and masked inputs are not read. After the last kept token stands value 0 (a truncated completion counts as
terminal), or ``bootstrap_values`` [b] where they are given. Whitening comes after, if at all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rljax.losses.kl import k1, log_ratio
from rljax.losses.masked import zero_masked
from rljax.losses.shapes import check_shapes

PerToken = Float[Array, "b t"]
PerRow = Float[Array, " b"]


class Estimate(NamedTuple):
    """``advantages`` for the policy, ``returns`` for the critic to fit."""

    advantages: PerToken
    returns: PerToken


@check_shapes
def is_last_token(mask: Bool[Array, "b t"]) -> Bool[Array, "b t"]:
    """True at the last kept token of each row; nowhere in an empty row."""
    kept_from_here = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    return mask & (kept_from_here == 1)


@check_shapes
def on_last_token(scores: PerRow, mask: Bool[Array, "b t"]) -> PerToken:
    """Each row's score on its last kept token, 0 elsewhere; the score of an empty row is dropped."""
    return zero_masked(is_last_token(mask), jnp.broadcast_to(scores[:, None], mask.shape))


@check_shapes
def shaped_rewards(
    scores: PerRow, logprobs: PerToken, ref_logprobs: PerToken, mask: Bool[Array, "b t"], *, kl_coef: float
) -> PerToken:
    """``r_t = -kl_coef · k1_t + 1[t = last] · score`` (1909.08593, eq. 2, as 2203.02155 spreads it over tokens)."""
    logprobs, ref_logprobs = zero_masked(mask, logprobs, ref_logprobs)
    return on_last_token(scores, mask) - kl_coef * k1(logprobs, ref_logprobs)


@check_shapes
def reward_to_go(
    rewards: PerToken, mask: Bool[Array, "b t"], *, gamma: float, bootstrap_values: PerRow | None = None
) -> PerToken:
    """``R_t = r_t + γ R_{t+1}``, to be maximised."""

    def step(following, reward):
        total = reward + gamma * following
        return total, total

    rewards = zero_masked(mask, rewards)
    return _backwards(step, _after(rewards, bootstrap_values), mask, rewards)


@check_shapes
def n_step_returns(
    rewards: PerToken,
    values: PerToken,
    mask: Bool[Array, "b t"],
    *,
    n_steps: int,
    gamma: float,
    bootstrap_values: PerRow | None = None,
) -> PerToken:
    """``Σ_{k<n} γ^k r_{t+k} + γ^n V_{t+n}`` over the next n kept tokens; past the end, what stands after it."""
    if n_steps < 1:
        raise ValueError(f"n_step_returns got n_steps={n_steps}; it needs at least 1")
    rewards, values = zero_masked(mask, rewards, values)

    def step(following, now):  # following[k]: the k-step return of the next token, k = 0 its value
        reward, value = now
        returns = (value, *(reward + gamma * shorter for shorter in following))
        return returns[:-1], returns[-1]

    start = (_after(rewards, bootstrap_values),) * n_steps
    return _backwards(step, start, mask, (rewards, values))


@check_shapes
def gae(
    rewards: PerToken,
    values: PerToken,
    mask: Bool[Array, "b t"],
    *,
    gamma: float,
    lam: float,
    bootstrap_values: PerRow | None = None,
) -> Estimate:
    """``δ_t = r_t + γ V_{t+1} - V_t``, ``A_t = δ_t + γλ A_{t+1}``, ``R_t = A_t + V_t`` (1506.02438, eq. 16).

    ``values[:, t]`` is read at the position that predicts ``tokens[:, t]``.
    """
    rewards, values = zero_masked(mask, rewards, values)

    def step(following, now):
        next_value, next_advantage = following
        reward, value = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        return (value, advantage), advantage

    after = _after(rewards, bootstrap_values)
    advantages = _backwards(step, (after, jnp.zeros_like(after)), mask, (rewards, values))
    return Estimate(advantages, advantages + values)


@check_shapes
def vtrace(
    logprobs: PerToken,
    behavior_logprobs: PerToken,
    rewards: PerToken,
    values: PerToken,
    mask: Bool[Array, "b t"],
    *,
    gamma: float,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    bootstrap_values: PerRow | None = None,
) -> Estimate:
    """V-trace for samples of an older policy (1802.01561, eq. 1): ``returns`` are its targets v_t.

    With w = π/μ, ρ = min(w, rho_clip), c = min(w, c_clip): ``v_t = V_t + ρ_t (r_t + γ V_{t+1} - V_t) +
    γ c_t (v_{t+1} - V_{t+1})`` and ``A_t = ρ_t (r_t + γ v_{t+1} - V_t)``. The advantages carry ρ already: use them with
    ``reinforce``. On policy v_t is the reward-to-go.
    """
    arrays = zero_masked(mask, logprobs, behavior_logprobs, rewards, values)

    def step(following, now):
        next_value, next_target = following
        logprob, behavior_logprob, reward, value = now
        weight = jnp.exp(log_ratio(logprob, behavior_logprob))
        rho, c = jnp.minimum(weight, rho_clip), jnp.minimum(weight, c_clip)
        target = value + rho * (reward + gamma * next_value - value) + gamma * c * (next_target - next_value)
        return (value, target), (rho * (reward + gamma * next_target - value), target)

    after = _after(arrays[2], bootstrap_values)
    return Estimate(*_backwards(step, (after, after), mask, arrays))


def _after(rewards: PerToken, bootstrap_values: PerRow | None) -> PerRow:
    return jnp.zeros_like(rewards[:, 0]) if bootstrap_values is None else bootstrap_values.astype(rewards.dtype)


def _backwards(step: Callable[[Any, Any], tuple[Any, Any]], start: Any, mask: Bool[Array, "b t"], arrays: Any) -> Any:
    """Scans ``step(following, now) -> (carried, result)`` from the last token; masked tokens pass ``following`` on."""

    def masked_step(following, now):
        kept, values = now
        carried, result = step(following, values)
        carried = jax.tree.map(lambda new, old: jnp.where(kept, new, old), carried, following)
        return carried, jax.tree.map(lambda x: jnp.where(kept, x, 0), result)

    dtype = jnp.result_type(*jax.tree.leaves((start, arrays)))
    start = jax.tree.map(lambda x: x.astype(dtype), start)
    by_time = jax.tree.map(jnp.transpose, (mask, arrays))
    return jax.tree.map(jnp.transpose, lax.scan(masked_step, start, by_time, reverse=True)[1])
