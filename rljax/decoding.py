"""From logits to a token: temperature, truncation, and sampling with randomness keyed by identity."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rljax.losses.value import unimix_logprobs
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
    unimix: float = 0.0  # this share of the distribution is even over the vocabulary

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


class Drawn(NamedTuple):
    """One token of each row; its log-prob; the support it was drawn from, -inf for the whole vocabulary."""

    tokens: Int[Array, " b"]
    logprobs: Float[Array, " b"]
    support: Float[Array, " b"]


def draw(
    keys: PRNGKeyArray, logits: Float[Array, "v b"], sampling: Sampling, greedy: Bool[Array, " b"] | None = None
) -> Drawn:
    """Two-level Gumbel-max: a block by its mass, then a token inside it, each from its own draw.

    ``logits`` stand with the vocabulary first, as the head's table does, padded with -inf to whole blocks: one pass
    over them gives the masses of the blocks, and these the draw and the normaliser of its log-prob. The block size is
    fixed, so neither the mesh nor the padding of the vocabulary changes a draw. Two independent draws of v / 128 and
    128 numbers instead of one of v, and no draw is reused: rounding of a mass flips next to nothing. Rows that are
    ``greedy`` get the likeliest token.
    """
    scaled = logits / sampling.scoring_temperature
    support = jnp.full(scaled.shape[1], -jnp.inf, scaled.dtype)
    if sampling.truncates:
        support = support_threshold(scaled.T, sampling)
        scaled = jnp.where(scaled >= support, scaled, -jnp.inf)
    if sampling.unimix:
        scaled = _unimixed(scaled, sampling.unimix)
    blocks = scaled.reshape(-1, VOCAB_BLOCK, scaled.shape[1])
    tops = jnp.max(blocks, axis=1)
    finite = jnp.where(jnp.isfinite(tops), tops, 0)
    masses = (finite + jnp.log(jnp.sum(jnp.exp(blocks - finite[:, None]), axis=1))).T
    if sampling.temperature == 0:
        block = jnp.argmax(tops, axis=0)
        inside = _block(blocks, block)
        token = jnp.argmax(inside, axis=1)
    else:
        block_keys, token_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        block = jnp.argmax(masses + _gumbel(block_keys, masses.shape[1]), axis=1)
        block = block if greedy is None else jnp.where(greedy, jnp.argmax(tops, axis=0), block)
        inside, noise = _block(blocks, block), _gumbel(token_keys, VOCAB_BLOCK)
        noise = noise if greedy is None else jnp.where(greedy[:, None], 0, noise)
        token = jnp.argmax(inside + noise, axis=1)
    chosen = jnp.take_along_axis(inside, token[:, None], axis=1)[:, 0]
    logprobs = chosen - jax.nn.logsumexp(masses, axis=1)
    return Drawn((block * VOCAB_BLOCK + token).astype(jnp.int32), logprobs, support)


def _unimixed(scaled: Float[Array, "v b"], share: float) -> Float[Array, "v b"]:
    """Log-probs with the even part; padding of the vocabulary stays -inf."""
    real = jnp.isfinite(scaled)
    logprobs = jax.nn.log_softmax(scaled, axis=0)
    return jnp.where(real, unimix_logprobs(logprobs, share, jnp.sum(real, axis=0)), -jnp.inf)


def _block(blocks: Float[Array, "n k b"], chosen: Int[Array, " b"]) -> Float[Array, "b k"]:
    """Every row's own block."""
    return blocks[chosen, :, jnp.arange(chosen.shape[0])]


def _gumbel(keys: PRNGKeyArray, count: int) -> Float[Array, "b n"]:
    # float32 draws whatever the dtype of the logits: the same random numbers in every precision.
    return jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32))(keys)
