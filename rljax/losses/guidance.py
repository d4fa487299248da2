"""A language model as a guide of another learner: its policy as a prior, its judgement as a shift of the reward."""

import jax
import jax.numpy as jnp
from jax import lax, nn
from jaxtyping import Array, Float

from rljax.losses.masked import at_least_float32
from rljax.losses.shapes import check_shapes


@check_shapes
def soft_value(
    q_values: Float[Array, "*s a"], prior_logprobs: Float[Array, "*s a"], temperature: float | Float[Array, ""]
) -> Float[Array, "*s"]:
    """``λ log Σ_a π_prior(a) e^{Q(a)/λ}``: from the prior's mean (λ → ∞) to the maximum (λ → 0) (2402.16181, eq. 5)."""
    q_values, prior_logprobs = at_least_float32(q_values), at_least_float32(prior_logprobs)
    return temperature * nn.logsumexp(prior_logprobs + q_values / temperature, axis=-1)


@check_shapes
def posterior_logprobs(
    q_values: Float[Array, "*s a"], prior_logprobs: Float[Array, "*s a"], temperature: float | Float[Array, ""]
) -> Float[Array, "*s a"]:
    """``π ∝ π_prior e^{Q/λ}``: the best policy for Q less λ KL(π‖prior) (2402.16181)."""
    return nn.log_softmax(at_least_float32(prior_logprobs) + at_least_float32(q_values) / temperature, axis=-1)


@check_shapes
def soft_value_iteration(
    rewards: Float[Array, "h s a"],
    transitions: Float[Array, "h s a s"],
    prior_logprobs: Float[Array, "h s a"],
    *,
    temperature: float,
    bonus: Float[Array, "h s a"] | None = None,
) -> tuple[Float[Array, "h s"], Float[Array, "h s a"]]:
    """Values and log-probs of the policy after LINVIT's backward pass, ``Q = r + bonus + E V'`` (2402.16181).

    ``bonus`` is the optimism of a model that was estimated. After the horizon stands value 0.
    """
    rewards = at_least_float32(rewards if bonus is None else rewards + bonus)

    def step(following: Array, now: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        reward, transition, prior = now
        q_values = reward + transition @ following
        values = soft_value(q_values, prior, temperature)
        return values, (values, posterior_logprobs(q_values, prior, temperature))

    last = jnp.zeros(rewards.shape[1], rewards.dtype)
    stages = jax.tree.map(at_least_float32, (rewards, transitions, prior_logprobs))
    return lax.scan(step, last, stages, reverse=True)[1]


@check_shapes
def shifted_rewards(
    rewards: Float[Array, "*s"], shift: Float[Array, "*s"], *, coef: float, progress: float | Float[Array, ""]
) -> Float[Array, "*s"]:
    """LMGT: ``r + coef · (1 - progress) · δ`` with progress from 0 to 1 (2409.04744); annealed it leaves no bias.

    δ is a language model's judgement: above 0 it asks for more of the action, below 0 for less. It is no potential, so
    while it lasts the best policy may be another.
    """
    left = jnp.clip(1 - jnp.asarray(progress, jnp.float32), 0, 1)
    return at_least_float32(rewards) + coef * left * at_least_float32(shift)
