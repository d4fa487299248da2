"""Forward passes for training and scoring: rows through a model, and what is read off its hidden states."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rljax.algos.base import Algorithm, Batch
from rljax.compiles import named
from rljax.losses.chunked_logprobs import chunked_logprobs
from rljax.losses.head_logits import reduce_logits_in_chunks
from rljax.losses.logprobs import LogprobStats, log_normalizer
from rljax.losses.preference_variants import log_collision
from rljax.losses.supervised import mean_logprob
from rljax.losses.value import unimix_logprobs
from rljax.models.decoder import Model, Params, head_table, hidden_states, row_positions, scalar_scores
from rljax.packing import by_shard, map_rows
from rljax.sharding import Layout, fetched
from rljax.types import Outputs

CPU_VOCAB_BLOCK = 2048  # entries of the vocabulary whose logits stay in a core's cache beside the products' operands


def vocab_block(layout: Layout) -> int | None:
    """Entries of the vocabulary whose logits exist at once; None: all of them."""
    return CPU_VOCAB_BLOCK if layout.on_cpu and layout.tensor == 1 else None


@dataclass(frozen=True)
class Forward:
    """How rows go through a model: static, closed over by every program."""

    model: Model
    layout: Layout
    dtype: Any
    remat: str
    logits_chunk: int
    temperature: float
    attention: str  # kernel, as hidden_states takes it
    truncates: bool  # the sampler cut the vocabulary: log-probs are renormalised on each token's stored support
    unimix: float = 0.0  # as the sampler's, for rows that it wrote: those with a ``support``

    def outputs(self, params: Params, batch: Batch, head_from: int, needs: frozenset[str] = frozenset()) -> Outputs:
        """Log-probs of the tokens from column ``head_from`` on, in one chunked head pass; zeros elsewhere.

        Where the batch has a ``loss_mask`` its tokens alone are looked at. ``needs`` may add "entropy", "full_logprobs"
        (those of the whole vocabulary where sampling truncates it: a second pass), "topk_logprobs" (of
        ``batch["teacher_tokens"]``), "collision" and "logit_means".
        """
        run = by_shard(self.layout, partial(self._shard_outputs, head_from, needs), whole=1)
        return run(head_table(params), self.hidden(params, batch), batch)

    def scores(self, params: Params, batch: Batch) -> Float[Array, "b t"] | Float[Array, "b t n"]:
        """What a scalar model says at every token."""
        scores = scalar_scores(params, self.hidden(params, batch))
        if "place" not in batch:
            return scores

        def unbinned(scores: Array, place: Array) -> Array:
            return scores.reshape(-1, *scores.shape[2:]).at[place].get(mode="fill", fill_value=0)

        return by_shard(self.layout, unbinned)(scores, batch["place"])

    def top_k(self, params: Params, batch: Batch, head_from: int, k: int) -> tuple[Array, Array]:
        """The ``k`` likeliest tokens at every position and their log-probs, [b t k]; zeros before ``head_from``."""

        def run(table: Array, hidden: Array, batch: Batch) -> tuple[Array, Array]:
            reads = _Reads(hidden, batch, head_from)
            tokens, logprobs = self._reduced(partial(_top_k, k), table, reads, reads.targets)
            return reads.put(tokens), reads.put(logprobs)

        return by_shard(self.layout, run, whole=1)(head_table(params), self.hidden(params, batch), batch)

    def hidden(self, params: Params, batch: Batch) -> Float[Array, "b t d"]:
        """Hidden states of rows, or of the bins that they are packed in."""
        if "bin_tokens" in batch:
            tokens, segments, positions = (batch[f"bin_{name}"] for name in ("tokens", "segments", "positions"))
        else:
            tokens, valid = batch["tokens"], batch["valid"]
            segments = batch.get("segments", valid.astype(jnp.int32))
            positions = batch.get("positions", row_positions(valid))
        return hidden_states(
            self.model,
            self.layout,
            params,
            tokens,
            segments,
            positions,
            dtype=self.dtype,
            remat=self.remat,
            attention=self.attention,
        )

    def _shard_outputs(
        self, head_from: int, needs: frozenset[str], table: Array, hidden: Array, batch: Batch
    ) -> Outputs:
        reads = _Reads(hidden, batch, head_from)
        support = reads.get(batch["support"]) if self.truncates and "support" in batch else None

        def head_pass(support: Array | None, with_entropy: bool) -> LogprobStats:
            return chunked_logprobs(
                reads.hidden,
                table,
                reads.targets,
                chunk_size=self.logits_chunk,
                temperature=self.temperature,
                vocab_size=self.model.config.vocab_size,
                support=support,
                with_entropy=with_entropy,
                count=reads.count,
                vocab_block=vocab_block(self.layout),
            )

        stats = head_pass(support, "entropy" in needs)
        if self.unimix and "support" in batch:
            mixed = unimix_logprobs(stats.logprobs, self.unimix, self.model.config.vocab_size)
            stats = stats._replace(logprobs=mixed)
        outputs = Outputs(reads.put(stats.logprobs), None if stats.entropy is None else reads.put(stats.entropy))
        if "full_logprobs" in needs and support is not None:
            outputs = outputs._replace(full_logprobs=reads.put(head_pass(None, False).logprobs))
        if "topk_logprobs" in needs:
            chosen = self._reduced(_gather_logprobs, table, reads, reads.get(batch["teacher_tokens"]))
            outputs = outputs._replace(topk_logprobs=reads.put(chosen))
        if "collision" in needs:
            collision = self._reduced(_log_collision, table, reads, reads.targets)
            outputs = outputs._replace(collision=reads.put(collision))
        if "logit_means" in needs:
            mean, normalizer = self._reduced(_logit_means, table, reads, reads.targets)
            outputs = outputs._replace(mean_logprobs=reads.put(mean), log_normalizers=reads.put(normalizer))
        return outputs

    def _reduced(self, reducer: Callable, table: Array, reads: "_Reads", rows: Array) -> Any:
        """``reducer(logits, rows)`` of each chunk, [n ...]."""

        def reduce(logits: Array, rows: Array) -> Any:
            return reducer(logits / self.temperature, rows)

        return reduce_logits_in_chunks(
            reads.hidden,
            table,
            reduce,
            (rows,),
            chunk_size=self.logits_chunk,
            vocab_size=self.model.config.vocab_size,
            count=reads.count,
        )


class _Reads:
    """On one data shard: the tokens that the head is asked about, in one line, first those that there are."""

    def __init__(self, hidden: Array, batch: Batch, head_from: int):
        valid = batch["valid"]
        mask = batch.get("loss_mask", valid) & (jnp.arange(valid.shape[1]) >= head_from)
        self._shape = mask.shape
        line = hidden.reshape(-1, hidden.shape[-1])
        place = batch.get("place", jnp.arange(mask.size).reshape(mask.shape))
        room = min(mask.shape[0] * (mask.shape[1] - head_from), len(line))
        self._at = jnp.nonzero(mask.reshape(-1), size=room, fill_value=mask.size)[0]
        self.count = jnp.sum(mask, dtype=jnp.int32)
        # A token is predicted by what stands before it.
        before = place.reshape(-1).at[self._at].get(mode="fill", fill_value=len(line) + 1) - 1
        self.hidden = line.at[before].get(mode="fill", fill_value=0)
        self.targets = self.get(batch["tokens"])

    def get(self, x: Float[Array, "b t ..."]) -> Float[Array, "n ..."]:
        return x.reshape(-1, *x.shape[2:]).at[self._at].get(mode="fill", fill_value=0)

    def put(self, values: Float[Array, "n ..."]) -> Float[Array, "b t ..."]:
        """Zeros where nothing was asked."""
        b, t = self._shape
        line = jnp.zeros((b * t, *values.shape[1:]), values.dtype).at[self._at].set(values, mode="drop")
        return line.reshape(b, t, *values.shape[1:])


def _gather_logprobs(logits: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens, axis=-1)


def _log_collision(logits: Array, tokens: Array) -> Array:
    return log_collision(logits)


def _logit_means(logits: Array, tokens: Array) -> tuple[Array, Array]:
    return mean_logprob(logits), log_normalizer(logits)


def _top_k(k: int, logits: Array, tokens: Array) -> tuple[Array, Array]:
    values, chosen = jax.lax.top_k(jax.nn.log_softmax(logits), k)
    return chosen.astype(jnp.int32), values


def head_needs(algorithm: Algorithm) -> frozenset[str]:
    """What an algorithm's loss reads of the policy's head beside the log-probs."""
    asked = {"entropy", "collision", "logit_means"} & algorithm.needs
    asked |= {"full_logprobs"} if "ref_logprobs" in algorithm.needs else set()
    return frozenset(asked | ({"topk_logprobs"} if "teacher_topk" in algorithm.needs else set()))


def tree_outputs(
    forwards: Mapping[str, Forward], algorithm: Algorithm, params: Mapping[str, Params], batch: Batch, head_from: int
) -> Outputs:
    """What the loss of ``algorithm`` reads, of every tree that it trains."""
    outputs = Outputs()
    if "policy" in params:
        outputs = forwards["policy"].outputs(params["policy"], batch, head_from, head_needs(algorithm))
    if "critic" in params:
        outputs = outputs._replace(values=as_values(forwards["critic"].scores(params["critic"], batch)))
    if "reward_model" in params:
        outputs = outputs._replace(scores=forwards["reward_model"].scores(params["reward_model"], batch))
    return outputs


def as_values(scores: Float[Array, "b t ..."]) -> Float[Array, "b t ..."]:
    """What a critic says of the state that predicts token t: it is read one column earlier."""
    return jnp.pad(scores[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (scores.ndim - 2))


def last_scores(scores: Float[Array, "b t ..."], valid: Array) -> Float[Array, "b ..."]:
    """The score at each row's last token."""
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jax.vmap(lambda row, at: row[at])(scores, last)


def make_score(
    forward: Forward,
    head_from: int,
    pieces: int,
    bin_length: int | None = None,
    *,
    from_host: bool = False,
    name: str = "score_policy",
) -> Callable[[Params, Batch], Float[Array, "b t"]]:
    """``score(params, batch) -> logprobs``: teacher-forced log-probs of every row, a piece of the rows at a time.

    With ``bin_length`` rows are packed into bins of that many tokens (0: as many as a row is wide). ``from_host``
    parameters lie in the hosts' memory. ``name`` is of PROGRAMS (``rljax/compiles.py``).
    """

    def logprobs(params: Params, rows: Batch) -> Array | None:
        return forward.outputs(params, rows, head_from).logprobs

    return _in_pieces(name, forward, pieces, bin_length, logprobs, from_host)


def make_value(
    forward: Forward, pieces: int, bin_length: int | None = None
) -> Callable[[Params, Batch], tuple[Array, Array]]:
    """``value(params, batch) -> (values, final_values)`` of a critic: [b t], and [b] at each row's last token."""

    def value(params: Params, rows: Batch) -> tuple[Array, Array]:
        scores = forward.scores(params, rows)
        return as_values(scores), last_scores(scores, rows["valid"])

    return _in_pieces("values", forward, pieces, bin_length, value)


def make_reward(
    forward: Forward, pieces: int, bin_length: int | None = None, name: str = "reward"
) -> Callable[[Params, Batch], Float[Array, " b"]]:
    """``reward(params, batch) -> [b]``: a reward model's score at the last token of every row."""

    def reward(params: Params, rows: Batch) -> Array:
        return last_scores(forward.scores(params, rows), rows["valid"])

    return _in_pieces(name, forward, pieces, bin_length, reward)


def make_teacher(
    forward: Forward, head_from: int, pieces: int, k: int, bin_length: int | None = None
) -> Callable[[Params, Batch], tuple]:
    """``teacher(params, batch) -> (tokens, logprobs)``, [b t k]: the likeliest tokens of every position."""

    def top_tokens(params: Params, rows: Batch) -> tuple[Array, Array]:
        return forward.top_k(params, rows, head_from, k)

    return _in_pieces("teacher", forward, pieces, bin_length, top_tokens)


def _in_pieces(
    name: str,
    forward: Forward,
    pieces: int,
    bin_length: int | None,
    run: Callable[[Params, Batch], Any],
    from_host: bool = False,
) -> Callable[[Params, Batch], Any]:
    def score(params: Params, batch: Batch) -> Any:
        params = fetched(params) if from_host else params
        return map_rows(partial(run, params), batch, pieces, bin_length, forward.layout)

    return jax.jit(named(name, score))
