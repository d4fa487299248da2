"""Rows through a model, as training and scoring run them: one pass, then what was asked of its hidden states."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from rljax.algos.base import Algorithm, Batch
from rljax.losses.logprobs import chunked_logprobs, log_normalizer, reduce_logits_in_chunks
from rljax.losses.preference_variants import log_collision
from rljax.losses.supervised import mean_logprob
from rljax.models.decoder import Model, Params, head_table, hidden_states, row_positions, scalar_scores
from rljax.sharding import BATCH_AXES, Layout
from rljax.types import Outputs, PyTree


@dataclass(frozen=True)
class Forward:
    """How rows go through a model: static, closed over by every program."""

    model: Model
    layout: Layout
    dtype: Any
    remat: str
    logits_chunk: int
    temperature: float
    truncates: bool  # the sampler cut the vocabulary: log-probs are renormalised on each token's stored support

    def outputs(self, params: Params, batch: Batch, head_from: int, needs: frozenset[str] = frozenset()) -> Outputs:
        """Log-probs of ``tokens[:, head_from:]`` in one chunked head pass; zeros before that column.

        ``needs`` may add "entropy", "full_logprobs" (those of the whole vocabulary where sampling truncates it: a
        second pass), "topk_logprobs" (of ``batch["teacher_tokens"]``), "collision" and "logit_means".
        """
        hidden = self.hidden(params, batch)[:, head_from - 1 : -1]
        table, targets = head_table(params), batch["tokens"][:, head_from:]
        support = batch["support"][:, head_from:] if self.truncates and "support" in batch else None

        def pad(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (head_from, 0)) + ((0, 0),) * (x.ndim - 2))

        def head_pass(support: Array | None, with_entropy: bool) -> tuple[Array, Array | None]:
            run = self._over_data(partial(self._head_pass, with_entropy))
            logprobs, entropy = run(table, hidden, targets, support)
            return pad(logprobs), None if entropy is None else pad(entropy)

        logprobs, entropy = head_pass(support, "entropy" in needs)
        full = head_pass(None, False)[0] if "full_logprobs" in needs and support is not None else None
        topk = collision = mean = normalizer = None
        if "topk_logprobs" in needs:
            chosen = batch["teacher_tokens"][:, head_from:]
            topk = pad(self._over_data(partial(self._reduced, _gather_logprobs))(table, hidden, chosen))
        if "collision" in needs:
            collision = pad(self._over_data(partial(self._reduced, _log_collision))(table, hidden, targets))
        if "logit_means" in needs:
            means = self._over_data(partial(self._reduced, _logit_means))(table, hidden, targets)
            mean, normalizer = map(pad, means)
        return Outputs(
            logprobs,
            entropy,
            full_logprobs=full,
            topk_logprobs=topk,
            collision=collision,
            mean_logprobs=mean,
            log_normalizers=normalizer,
        )

    def scores(self, params: Params, batch: Batch) -> Float[Array, "b t"] | Float[Array, "b t n"]:
        """What a scalar model says at every token."""
        return scalar_scores(params, self.hidden(params, batch))

    def top_k(self, params: Params, batch: Batch, head_from: int, k: int) -> tuple[Array, Array]:
        """The ``k`` likeliest tokens at every position and their log-probs, [b t k]; zeros before ``head_from``."""
        hidden = self.hidden(params, batch)[:, head_from - 1 : -1]
        run = self._over_data(partial(self._reduced, partial(_top_k, k)))
        tokens, logprobs = run(head_table(params), hidden, batch["tokens"][:, head_from:])
        grow = ((0, 0), (head_from, 0), (0, 0))
        return jnp.pad(tokens, grow), jnp.pad(logprobs, grow)

    def hidden(self, params: Params, batch: Batch) -> Float[Array, "b t d"]:
        tokens, valid = batch["tokens"], batch["valid"]
        segments = batch.get("segments", valid.astype(jnp.int32))
        positions = batch.get("positions", row_positions(valid))
        return hidden_states(
            self.model, self.layout, params, tokens, segments, positions, dtype=self.dtype, remat=self.remat
        )

    def _over_data(self, run: Callable) -> Callable:
        """``run(table, *rows)`` on each data shard's own rows."""
        if self.layout.data_shards == 1:  # XLA cannot partition the derivative where the manual axes have size 1
            return run
        rows = PartitionSpec(BATCH_AXES)

        def sharded(table: Array, *arrays: Any) -> Any:
            return jax.shard_map(
                run,
                mesh=self.layout.mesh,
                in_specs=(PartitionSpec(), *(rows for _ in arrays)),
                out_specs=rows,
                axis_names=set(BATCH_AXES),
                check_vma=False,
            )(table, *arrays)

        return sharded

    def _head_pass(
        self, with_entropy: bool, table: Array, hidden: Array, targets: Array, support: Array | None
    ) -> tuple[Array, Array | None]:
        b, t = targets.shape
        stats = chunked_logprobs(
            hidden.reshape(b * t, -1),
            table,
            targets.reshape(-1),
            chunk_size=self.logits_chunk,
            temperature=self.temperature,
            vocab_size=self.model.config.vocab_size,
            support=None if support is None else support.reshape(-1),
            with_entropy=with_entropy,
        )
        return stats.logprobs.reshape(b, t), None if stats.entropy is None else stats.entropy.reshape(b, t)

    def _reduced(self, reducer: Callable, table: Array, hidden: Array, rows: Array) -> Any:
        """``reducer(logits, rows)`` of each chunk, [b t ...]."""
        b, t = hidden.shape[:2]

        def reduce(logits: Array, rows: Array) -> Any:
            return reducer(logits / self.temperature, rows)

        flat = reduce_logits_in_chunks(
            hidden.reshape(b * t, -1),
            table,
            reduce,
            (rows.reshape(b * t, *rows.shape[2:]),),
            chunk_size=self.logits_chunk,
            vocab_size=self.model.config.vocab_size,
        )
        return jax.tree.map(lambda x: x.reshape(b, t, *x.shape[1:]), flat)


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


def cut_rows(tree: PyTree, pieces: int, layout: Layout) -> PyTree:
    """[rows, ...] to [pieces, rows / pieces, ...]; each piece takes its share from every data shard: nothing moves."""
    shards = layout.data_shards

    def cut(x: Array) -> Array:
        per_shard = x.reshape(shards, pieces, x.shape[0] // (shards * pieces), *x.shape[1:])
        pieces_first = per_shard.swapaxes(0, 1).reshape(pieces, x.shape[0] // pieces, *x.shape[1:])
        return layout.constrain(pieces_first, None, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(cut, tree)


def take_rows(tree: PyTree, rows: Int[Array, "pieces n"], layout: Layout) -> PyTree:
    """[rows, ...] to [pieces, n, ...] by number, each piece over all data shards."""
    return jax.tree.map(lambda x: layout.constrain(x[rows], None, "batch", *(None,) * (x.ndim - 1)), tree)


def join_rows(tree: PyTree, layout: Layout) -> PyTree:
    """The inverse of ``cut_rows``."""
    shards = layout.data_shards

    def join(x: Array) -> Array:
        pieces, rows = x.shape[:2]
        per_shard = x.reshape(pieces, shards, rows // shards, *x.shape[2:]).swapaxes(0, 1)
        return layout.constrain(per_shard.reshape(pieces * rows, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(join, tree)


def make_score(forward: Forward, head_from: int, pieces: int) -> Callable[[Params, Batch], Float[Array, "b t"]]:
    """``score(params, batch) -> logprobs``: teacher-forced log-probs of every row, a piece of the rows at a time."""
    return _in_pieces(forward, pieces, lambda params, rows: forward.outputs(params, rows, head_from).logprobs)


def make_value(forward: Forward, pieces: int) -> Callable[[Params, Batch], tuple[Array, Array]]:
    """``value(params, batch) -> (values, final_values)`` of a critic: [b t], and [b] at each row's last token."""

    def value(params: Params, rows: Batch) -> tuple[Array, Array]:
        scores = forward.scores(params, rows)
        return as_values(scores), last_scores(scores, rows["valid"])

    return _in_pieces(forward, pieces, value)


def make_reward(forward: Forward, pieces: int) -> Callable[[Params, Batch], Float[Array, " b"]]:
    """``reward(params, batch) -> [b]``: a reward model's score at the last token of every row."""
    return _in_pieces(forward, pieces, lambda params, rows: last_scores(forward.scores(params, rows), rows["valid"]))


def make_teacher(forward: Forward, head_from: int, pieces: int, k: int) -> Callable[[Params, Batch], tuple]:
    """``teacher(params, batch) -> (tokens, logprobs)``, [b t k]: the likeliest tokens of every position."""
    return _in_pieces(forward, pieces, lambda params, rows: forward.top_k(params, rows, head_from, k))


def _in_pieces(forward: Forward, pieces: int, run: Callable[[Params, Batch], Any]) -> Callable[[Params, Batch], Any]:
    def score(params: Params, batch: Batch) -> Any:
        results = jax.lax.map(partial(run, params), cut_rows(batch, pieces, forward.layout))
        return join_rows(results, forward.layout)

    return jax.jit(score)
