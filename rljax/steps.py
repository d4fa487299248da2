"""The compiled programs of training: scoring rows, and the whole update of one rollout or one draw of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rljax.algos.base import Algorithm, Batch, total
from rljax.losses.kl import k3
from rljax.losses.logprobs import chunked_logprobs
from rljax.losses.masked import count_sequences, count_tokens, masked_sum
from rljax.models.decoder import Model, Params, head_table, hidden_states, row_positions
from rljax.optim import state_shardings, tree_norms, update_ratios
from rljax.sharding import BATCH_AXES, Layout
from rljax.types import Outputs, PyTree, Term


class TrainState(NamedTuple):
    """Everything that training changes. Made and replaced here only, and donated."""

    step: Int[Array, ""]  # optimizer steps taken
    params: dict[str, Params]  # the trained trees by name: {"policy": ...}
    opt_state: PyTree
    algo_state: PyTree


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

    def outputs(
        self, params: Params, batch: Batch, head_from: int, *, with_entropy: bool, with_full: bool = False
    ) -> Outputs:
        """Log-probs (and entropy) of ``tokens[:, head_from:]`` in one chunked head pass; zeros before that column.

        ``with_full`` gives those of the whole vocabulary too where sampling truncates it: a second pass.
        """
        tokens, valid = batch["tokens"], batch["valid"]
        segments = batch.get("segments", valid.astype(jnp.int32))
        positions = batch.get("positions", row_positions(valid))
        hidden = hidden_states(
            self.model, self.layout, params, tokens, segments, positions, dtype=self.dtype, remat=self.remat
        )
        support = batch["support"][:, head_from:] if self.truncates and "support" in batch else None
        rows = PartitionSpec(BATCH_AXES)
        pad = partial(jnp.pad, pad_width=((0, 0), (head_from, 0)))

        def head_pass(support: Array | None, with_entropy: bool) -> tuple[Array, Array | None]:
            run = partial(self._head_pass, with_entropy)
            if self.layout.data_shards > 1:  # XLA cannot partition the derivative where the manual axes have size 1
                run = jax.shard_map(
                    run,
                    mesh=self.layout.mesh,
                    in_specs=(PartitionSpec(), rows, rows, rows),
                    out_specs=rows,
                    axis_names=set(BATCH_AXES),
                    check_vma=False,
                )
            logprobs, entropy = run(head_table(params), hidden[:, head_from - 1 : -1], tokens[:, head_from:], support)
            return pad(logprobs), None if entropy is None else pad(entropy)

        logprobs, entropy = head_pass(support, with_entropy)
        full = head_pass(None, False)[0] if with_full and support is not None else None
        return Outputs(logprobs, entropy, full_logprobs=full)

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

    def score(params: Params, batch: Batch) -> Array:
        def piece(rows: Batch) -> Array:
            return forward.outputs(params, rows, head_from, with_entropy=False).logprobs

        return join_rows(jax.lax.map(piece, cut_rows(batch, pieces, forward.layout)), forward.layout)

    return jax.jit(score)


@dataclass(frozen=True)
class UpdatePlan:
    """How one rollout becomes optimizer steps; every field is a count."""

    epochs: int
    minibatches: int
    micro_batches: int  # a minibatch's rows go through in this many pieces
    head_from: int


def init_state(
    params: dict[str, Params],
    shardings: dict[str, PyTree],
    optimizer: optax.GradientTransformation,
    algo_state: PyTree,
    layout: Layout,
) -> TrainState:
    """A state at step 0 whose moments are born where their parameters lie."""
    abstract = jax.eval_shape(optimizer.init, params)
    opt_state = jax.jit(optimizer.init, out_shardings=state_shardings(abstract, shardings, layout.replicated))(params)
    rest = jax.device_put((jnp.int32(0), algo_state), layout.replicated)
    return TrainState(rest[0], params, opt_state, rest[1])


def make_update(
    algorithm: Algorithm,
    forward: Forward,
    optimizer: optax.GradientTransformation,
    plan: UpdatePlan,
    state_sharding: TrainState,
) -> Callable[[TrainState, Batch, PRNGKeyArray], tuple[TrainState, dict[str, Array]]]:
    """``update(state, batch, key) -> (state, metrics)``: all optimizer steps of one rollout in one program.

    Metrics are arrays [optimizer steps]. A step whose loss or gradient is not finite leaves the state as it was and is
    counted in ``skipped``. The state is donated: what shares its buffers is gone afterwards.
    """

    def update(state: TrainState, batch: Batch, key: PRNGKeyArray) -> tuple[TrainState, dict[str, Array]]:
        def epoch(state: TrainState, number: Array) -> tuple[TrainState, dict[str, Array]]:
            minibatches = cut_rows(batch, 1, forward.layout)
            if plan.minibatches > 1:
                # Which rows make a minibatch is drawn over all of them: the mesh has no part in it.
                order = jax.random.permutation(jax.random.fold_in(key, number), batch["tokens"].shape[0])
                minibatches = take_rows(batch, order.reshape(plan.minibatches, -1), forward.layout)
            return jax.lax.scan(partial(_optimizer_step, algorithm, forward, optimizer, plan), state, minibatches)

        state, metrics = jax.lax.scan(epoch, state, jnp.arange(plan.epochs))
        return state, {name: values.reshape(-1) for name, values in metrics.items()}

    # The state leaves as it came, so that the second call finds the first one's program.
    return jax.jit(update, donate_argnums=0, out_shardings=(state_sharding, forward.layout.replicated))


def _optimizer_step(
    algorithm: Algorithm,
    forward: Forward,
    optimizer: optax.GradientTransformation,
    plan: UpdatePlan,
    state: TrainState,
    minibatch: Batch,
) -> tuple[TrainState, dict[str, Array]]:
    minibatch, denominators = algorithm.prepare(minibatch)
    denominators = {"tokens": count_tokens(minibatch["loss_mask"]), **denominators}
    denominators = {name: jnp.maximum(value, 1) for name, value in denominators.items()}
    gradients, sums, peaks = _accumulate(algorithm, forward, plan, state.params, minibatch, denominators)

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    norms, ratios = tree_norms(gradients), update_ratios(updates, state.params)
    finite = jnp.isfinite(sums["loss"]) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    stepped = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.algo_state)
    state = jax.tree.map(partial(jnp.where, finite), stepped, state)
    metrics = {
        **sums,
        **peaks,
        "skipped": ~finite,
        **{f"grad_norm/{name}": norm for name, norm in norms.items()},
        **{f"update_ratio/{name}": ratio for name, ratio in ratios.items()},
    }
    return state, metrics


def _accumulate(
    algorithm: Algorithm,
    forward: Forward,
    plan: UpdatePlan,
    params: dict[str, Params],
    minibatch: Batch,
    denominators: dict[str, Array],
) -> tuple[PyTree, dict[str, Array], dict[str, Array]]:
    """Gradients, metrics that add and metrics that take the largest, over the micro-batches of one step."""

    def loss(params: dict[str, Params], rows: Batch) -> tuple[Array, tuple[dict, dict]]:
        outputs = forward.outputs(
            params["policy"],
            rows,
            plan.head_from,
            with_entropy="entropy" in algorithm.needs,
            with_full="ref_logprobs" in algorithm.needs,
        )
        terms = algorithm.loss(outputs, rows)
        extra, peaks = _diagnostics(outputs.logprobs, rows)
        value = total(terms, denominators)
        sums = {name: term.numerator / denominators[term.denominator] for name, term in {**terms, **extra}.items()}
        return value, ({"loss": value, **sums}, peaks)

    gradient = jax.grad(loss, has_aux=True)

    def micro_batch(carry: tuple, rows: Batch) -> tuple[tuple, None]:
        gradients, (sums, peaks) = gradient(params, rows)
        return (
            jax.tree.map(jnp.add, carry[0], gradients),
            jax.tree.map(jnp.add, carry[1], sums),
            jax.tree.map(jnp.maximum, carry[2], peaks),
        ), None

    pieces = cut_rows(minibatch, plan.micro_batches, forward.layout)
    if plan.micro_batches == 1:
        gradients, (sums, peaks) = gradient(params, jax.tree.map(lambda x: x[0], pieces))
        return gradients, sums, peaks
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], *shapes[1]))
    return jax.lax.scan(micro_batch, zeros, pieces)[0]


def _diagnostics(logprobs: Array, rows: Batch) -> tuple[dict[str, Term], dict[str, Array]]:
    """How far the policy is from the one that sampled: the first place to look when a run goes wrong."""
    if "behavior_logprobs" not in rows:
        return {}, {}
    mask: Bool[Array, "b t"] = rows["loss_mask"]
    log_ratio = jax.lax.stop_gradient(jnp.where(mask, logprobs - rows["behavior_logprobs"], 0))
    terms = {
        "behavior_kl": Term(masked_sum(k3(rows["behavior_logprobs"], logprobs), mask), "tokens", 0.0),
        "logprob_gap": Term(masked_sum(jnp.abs(log_ratio), mask), "tokens", 0.0),
    }
    if "advantages" in rows:
        advantages = rows["advantages"]
        terms["advantage_mean"] = Term(masked_sum(advantages, mask), "tokens", 0.0)
        terms["advantage_square"] = Term(masked_sum(jnp.square(advantages), mask), "tokens", 0.0)
    return terms, {"max_log_ratio": jnp.max(jnp.abs(log_ratio))}


def make_divergence(layout: Layout) -> Callable[[Array, Array, Array], dict[str, Array]]:
    """``divergence(behavior, reference, mask)``: KL of the sampler to the reference (k1, its own samples), in nats."""

    def divergence(behavior: Array, reference: Array, mask: Array) -> dict[str, Array]:
        gap = masked_sum(behavior - reference, mask)
        return {
            "kl_per_token": gap / jnp.maximum(count_tokens(mask), 1),
            "kl_per_completion": gap / jnp.maximum(count_sequences(mask), 1),
        }

    return jax.jit(divergence, out_shardings=layout.replicated)


def copy_params(params: Params, shardings: PyTree, dtype: Any) -> Params:
    """A frozen copy in ``dtype``: a donating step would delete what it shares."""
    places, tree = jax.tree.flatten(shardings)
    return _copy_program(tree, tuple(places), dtype)(params)


@cache
def _copy_program(tree: Any, places: tuple[NamedSharding, ...], dtype: Any) -> Callable[[Params], Params]:
    """One for each layout: a reference that is reset every so many steps must not compile again."""
    shardings = jax.tree.unflatten(tree, places)
    return jax.jit(lambda p: jax.tree.map(lambda x: jnp.copy(x.astype(dtype)), p), out_shardings=shardings)
