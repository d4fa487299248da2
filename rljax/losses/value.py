"""Value losses per entry, to be minimised, and the two-hot value head of DreamerV3.

None takes a mask: see ``masked.zero_masked``. Targets are constants.
"""

import jax.numpy as jnp
from jax import lax, nn
from jaxtyping import Array, Float, Int

from rljax.losses.masked import at_least_float32
from rljax.losses.shapes import check_shapes


@check_shapes
def squared_value_loss(values: Float[Array, "*s"], returns: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``½ (V - R)²``."""
    return jnp.square(at_least_float32(values) - returns) / 2


@check_shapes
def clipped_value_loss(
    values: Float[Array, "*s"], behavior_values: Float[Array, "*s"], returns: Float[Array, "*s"], clip: float
) -> Float[Array, "*s"]:
    """``½ max((V - R)², (V_old + clip(V - V_old, ±c) - R)²)`` (PPO's code; 2403.17031, detail 20)."""
    values = at_least_float32(values)
    near = behavior_values + jnp.clip(values - behavior_values, -clip, clip)
    return jnp.maximum(squared_value_loss(values, returns), squared_value_loss(near, returns))


@check_shapes
def huber_value_loss(values: Float[Array, "*s"], returns: Float[Array, "*s"], delta: float = 1.0) -> Float[Array, "*s"]:
    """``½ e²`` up to |e| = δ, then ``δ (|e| - ½ δ)``, with e = V - R (Huber 1964)."""
    distance = jnp.abs(at_least_float32(values) - returns)
    near = jnp.minimum(distance, delta)
    return near * (distance - near / 2)


@check_shapes
def symlog(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``sign(x) ln(1 + |x|)`` (DreamerV3, 2301.04104)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


@check_shapes
def symexp(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``sign(x) (exp(|x|) - 1)``, the inverse of ``symlog``."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


def value_bins(n_bins: int = 256, low: float = -20.0, high: float = 20.0) -> Float[Array, " n"]:
    """Evenly spaced bin centres, in symlog space (the numbers of PPO with DreamerV3's tricks, 2310.17805)."""
    return jnp.linspace(low, high, n_bins)


@check_shapes
def two_hot(x: Float[Array, "*s"], bins: Float[Array, " n"]) -> Float[Array, "*s n"]:
    """Weights on the two bins around x: they sum to 1 and their mean is x; x outside the bins goes to the last one."""
    x = jnp.clip(at_least_float32(x), bins[0], bins[-1])
    above = jnp.clip(jnp.searchsorted(bins, x, side="right"), 1, bins.shape[0] - 1)
    left, right = bins[above - 1], bins[above]
    share = (x - left) / (right - left)
    n_bins = bins.shape[0]
    low, high = nn.one_hot(above - 1, n_bins, dtype=x.dtype), nn.one_hot(above, n_bins, dtype=x.dtype)
    return (1 - share)[..., None] * low + share[..., None] * high


@check_shapes
def two_hot_value(logits: Float[Array, "*s n"], bins: Float[Array, " n"]) -> Float[Array, "*s"]:
    """``symexp(Σ softmax(logits) · bins)``: the value, on the scale of returns; GAE takes this."""
    return symexp(jnp.sum(nn.softmax(at_least_float32(logits), axis=-1) * bins, axis=-1))


@check_shapes
def two_hot_cross_entropy(
    logits: Float[Array, "*s n"], returns: Float[Array, "*s"], bins: Float[Array, " n"]
) -> Float[Array, "*s"]:
    """``-Σ two_hot(symlog(R)) · log softmax(logits)`` (2301.04104); value clipping does not go with it."""
    target = two_hot(symlog(at_least_float32(returns)), bins)
    return -jnp.sum(target * nn.log_softmax(at_least_float32(logits), axis=-1), axis=-1)


@check_shapes
def unimix(logits: Float[Array, "*s n"], share: float = 0.01) -> Float[Array, "*s n"]:
    """Log-probs of ``(1 - u) softmax(logits) + u / n``: none below log(u / n) (2301.04104).

    For a policy apply it to stored and new log-probs alike.
    """
    return unimix_logprobs(nn.log_softmax(at_least_float32(logits), axis=-1), share, logits.shape[-1])


@check_shapes
def unimix_logprobs(logprobs: Float[Array, "*s"], share: float, choices: int | Int[Array, "..."]) -> Float[Array, "*s"]:
    """``log((1 - u) p + u / n)`` of a log p known alone, as a sampled token's is; n ``choices`` (2301.04104)."""
    return jnp.logaddexp(at_least_float32(logprobs) + jnp.log1p(-share), jnp.log(share / choices))


@check_shapes
def ema_critic_regularizer(
    logits: Float[Array, "*s n"], ema_logits: Float[Array, "*s n"], bins: Float[Array, " n"]
) -> Float[Array, "*s"]:
    """Cross entropy towards the value of the critic's moving average (2301.04104; decay .98), a constant here."""
    return two_hot_cross_entropy(logits, lax.stop_gradient(two_hot_value(ema_logits, bins)), bins)
