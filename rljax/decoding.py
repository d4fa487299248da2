"""From one row of logits to a token: temperature, truncation, and a draw whose randomness is keyed by identity."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rljax.losses.logprobs import token_logprobs, truncated_logprobs
from rljax.sharding import VOCAB_BLOCK


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off."""

    max_new_tokens: int
    end_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    greedy_samples: int = 0  # of a prompt's samples so many, the first, are greedy

    @property
    def scoring_temperature(self) -> float:
        """What log-probs divide by: greedy decoding reports those of the untempered model."""
        return self.temperature or 1.0

    @property
    def truncates(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def request_key(root: PRNGKeyArray, prompt_id: Int[Array, ""], sample_id: Int[Array, ""]) -> PRNGKeyArray:
    """The key of one sample: who it is, never where it runs."""
    return jax.random.fold_in(jax.random.fold_in(root, prompt_id), sample_id)


def draw_token(key: PRNGKeyArray, scaled: Float[Array, " v"]) -> Int[Array, ""]:
    """Two-level Gumbel-max: a block by its mass, then a token inside it, each from its own draw.

    The block size is fixed, so neither the mesh nor the padding of the vocabulary changes a draw. Two independent draws
    of v / 128 and 128 numbers instead of one of v, and no draw is reused: rounding of a mass flips next to nothing.
    """
    blocks = scaled.reshape(-1, VOCAB_BLOCK)
    masses = jax.nn.logsumexp(blocks, axis=-1)
    block_key, token_key = jax.random.split(key)
    # float32 draws whatever the dtype of the logits: the same random numbers in every precision.
    block = jnp.argmax(masses + jax.random.gumbel(block_key, masses.shape, jnp.float32))
    inside = jax.random.gumbel(token_key, (VOCAB_BLOCK,), jnp.float32)
    return block * VOCAB_BLOCK + jnp.argmax(blocks[block] + inside)


def support_threshold(scaled: Float[Array, "b v"], sampling: Sampling) -> Float[Array, " b"]:
    """The scaled logit at or above which a token is kept: halfway between the lowest kept and the highest cut one.

    Top-k first, then top-p over what it kept, then min-p relative to the most likely token. Halfway, so that a trainer
    whose logits differ by rounding recovers the same set. -inf where nothing was cut.
    """
    ordered = -jnp.sort(-scaled, axis=-1)
    rank = jnp.arange(scaled.shape[-1])
    keep = jnp.isfinite(ordered)
    if sampling.top_k > 0:
        keep &= rank < sampling.top_k
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        keep &= before < sampling.top_p
    if sampling.min_p > 0:
        keep &= ordered >= ordered[:, :1] + jnp.log(sampling.min_p)
    last = jnp.maximum(jnp.sum(keep, axis=-1) - 1, 0)[:, None]
    lowest = jnp.take_along_axis(ordered, last, axis=-1)[:, 0]
    after = jnp.take_along_axis(ordered, jnp.minimum(last + 1, scaled.shape[-1] - 1), axis=-1)[:, 0]
    nothing_cut = ~jnp.isfinite(after) | (last[:, 0] == scaled.shape[-1] - 1)
    return jnp.where(nothing_cut, -jnp.inf, (lowest + after) / 2)


def next_tokens(
    keys: PRNGKeyArray, logits: Float[Array, "b v"], sampling: Sampling
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """Tokens and the support they were drawn from. ``logits`` are padded with -inf to whole blocks."""
    scaled = logits / sampling.scoring_temperature
    whole = jnp.full(scaled.shape[0], -jnp.inf, scaled.dtype)
    if sampling.temperature == 0:
        return jnp.argmax(scaled, axis=-1).astype(jnp.int32), whole
    support = support_threshold(scaled, sampling) if sampling.truncates else whole
    kept = jnp.where(scaled >= support[:, None], scaled, -jnp.inf)
    return jax.vmap(draw_token)(keys, kept).astype(jnp.int32), support


def sample(
    keys: PRNGKeyArray, logits: Float[Array, "b v"], sampling: Sampling, greedy: Bool[Array, " b"]
) -> tuple[Int[Array, " b"], Float[Array, " b"], Float[Array, " b"]]:
    """Tokens, the likeliest where ``greedy``; their log-probs by the trainer's function; their support."""
    tokens, support = next_tokens(keys, logits, sampling)
    if sampling.greedy_samples:
        tokens = jnp.where(greedy, jnp.argmax(logits, axis=-1).astype(tokens.dtype), tokens)
    if sampling.truncates:
        return tokens, truncated_logprobs(logits, tokens, support, sampling.scoring_temperature), support
    return tokens, token_logprobs(logits, tokens, sampling.scoring_temperature), support
