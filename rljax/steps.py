"""The compiled update: all optimizer steps of one rollout, or of one draw of rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from rljax.algos.base import Algorithm, Batch, total
from rljax.compiles import named
from rljax.forward import Forward, tree_outputs
from rljax.losses.kl import k3
from rljax.losses.masked import count_sequences, count_tokens, masked_sum
from rljax.models.decoder import Params
from rljax.optim import state_shardings, tree_norms, update_ratios
from rljax.packing import cut_rows, make_packing, map_rows, pack, take_packed, take_rows
from rljax.sharding import HOST_MEMORY, Layout, fetched
from rljax.types import Outputs, PyTree, Term


class TrainState(NamedTuple):
    """Everything that training changes. Made and replaced here only, and donated."""

    step: Int[Array, ""]  # optimizer steps taken
    params: dict[str, Params]  # the trained trees by name: {"policy": ...}
    opt_state: PyTree
    algo_state: PyTree


@dataclass(frozen=True)
class UpdatePlan:
    """How one rollout becomes optimizer steps."""

    epochs: int
    minibatches: int
    micro_batches: int  # a minibatch's rows go through in this many pieces, and packed in no more
    head_from: int
    bin_length: int | None = None  # tokens of the bins that rows are packed in, 0: as a row has; None: unpacked
    text_coef: float = 0.0  # of the cross entropy of text that is mixed into every step (PPO-ptx)


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


# A stream of its own for each optimizer step: an epoch's shuffle has the small numbers.
STEP_KEYS = 2**32 - 1


class Update(NamedTuple):
    """What the update program closes over."""

    algorithm: Algorithm
    forwards: Mapping[str, Forward]  # by tree
    optimizer: optax.GradientTransformation
    plan: UpdatePlan
    places: PyTree  # shardings of the optimizer's state

    @property
    def layout(self) -> Layout:
        return next(iter(self.forwards.values())).layout

    def fetched(self, opt_state: PyTree) -> PyTree:
        """The optimizer's state where it is computed with: some of it may wait in the hosts' memory."""
        return jax.tree.map(lambda x, at: fetched(x) if at.memory_kind == HOST_MEMORY else x, opt_state, self.places)

    def put_away(self, opt_state: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x, at: jax.device_put(x, at) if at.memory_kind == HOST_MEMORY else x, opt_state, self.places
        )


def make_update(
    algorithm: Algorithm,
    forwards: Mapping[str, Forward],
    optimizer: optax.GradientTransformation,
    plan: UpdatePlan,
    state_sharding: TrainState,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """``update(state, batch, key, text=None) -> (state, metrics)``: all optimizer steps of one rollout in one program.

    ``text`` holds rows of plain text, an equal share for every optimizer step. Metrics are arrays [optimizer steps]. A
    step whose loss or gradient is not finite leaves the state as it was and is counted in ``skipped``. The state is
    donated: what shares its buffers is gone afterwards.
    """
    u = Update(algorithm, forwards, optimizer, plan, state_sharding.opt_state)

    def update(
        state: TrainState, batch: Batch, key: PRNGKeyArray, text: Batch | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        texts = None if text is None else cut_rows(text, plan.epochs * plan.minibatches, u.layout)

        def epoch(state: TrainState, number: Array) -> tuple[TrainState, dict[str, Array]]:
            minibatches = cut_rows(batch, 1, u.layout)
            if plan.minibatches > 1:
                # Which rows make a minibatch is drawn over all of them: the mesh has no part in it.
                units = batch["tokens"].shape[0] // algorithm.unit
                order = jax.random.permutation(jax.random.fold_in(key, number), units)
                rows = order[:, None] * algorithm.unit + jnp.arange(algorithm.unit)
                minibatches = take_rows(batch, rows.reshape(plan.minibatches, -1), u.layout)
            numbers = number * plan.minibatches + jnp.arange(plan.minibatches)
            mixed = None if texts is None else jax.tree.map(lambda x: x[numbers], texts)

            keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, STEP_KEYS)))(numbers)
            return jax.lax.scan(partial(_optimizer_step, u), state, (minibatches, keys, mixed))

        state, metrics = jax.lax.scan(epoch, state, jnp.arange(plan.epochs))
        return state, {name: values.reshape(-1) for name, values in metrics.items()}

    # The state leaves as it came, so that the second call finds the first one's program.
    return jax.jit(named("update", update), donate_argnums=0, out_shardings=(state_sharding, u.layout.replicated))


def _optimizer_step(
    u: Update, state: TrainState, inputs: tuple[Batch, PRNGKeyArray, Batch | None]
) -> tuple[TrainState, dict[str, Array]]:
    minibatch, key, text = inputs
    rows_before = minibatch["tokens"].shape[0]
    if "current_logprobs" in u.algorithm.needs:
        minibatch = {**minibatch, "current_logprobs": _current_logprobs(u, state.params["policy"], minibatch)}
    algo_state, minibatch, denominators = u.algorithm.prepare(state.algo_state, minibatch, key)
    denominators = {"tokens": count_tokens(minibatch["loss_mask"]), **denominators}
    denominators = {name: jnp.maximum(value, 1) for name, value in denominators.items()}
    gradients, sums, peaks = _accumulate(u, state.params, minibatch, denominators, rows_before)
    if text is not None:
        more, nll = _text_gradients(u, state.params["policy"], text)
        gradients = {**gradients, "policy": jax.tree.map(jnp.add, gradients["policy"], more)}
        sums = {**sums, "loss": sums["loss"] + u.plan.text_coef * nll, "text_nll": nll}

    state = state._replace(opt_state=u.fetched(state.opt_state))
    updates, opt_state = u.optimizer.update(gradients, state.opt_state, state.params)
    norms, ratios = tree_norms(gradients), update_ratios(updates, state.params)
    finite = jnp.isfinite(sums["loss"]) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    stepped = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, algo_state)
    state = jax.tree.map(partial(jnp.where, finite), stepped, state)
    state = state._replace(opt_state=u.put_away(state.opt_state))
    metrics = {
        **sums,
        **peaks,
        "skipped": ~finite,
        **{f"grad_norm/{name}": norm for name, norm in norms.items()},
        **{f"update_ratio/{name}": ratio for name, ratio in ratios.items()},
    }
    return state, metrics


def _current_logprobs(u: Update, policy: Params, minibatch: Batch) -> Array:
    """The policy's log-probs of the whole minibatch before the step: for statistics that cross rows."""

    def logprobs(rows: Batch) -> Array | None:
        return u.forwards["policy"].outputs(policy, rows, u.plan.head_from).logprobs

    return map_rows(logprobs, minibatch, u.plan.micro_batches, u.plan.bin_length, u.layout)


def _text_gradients(u: Update, policy: Params, text: Batch) -> tuple[Params, Array]:
    """Gradient of ``text_coef`` times the mean cross entropy of the text's tokens, and that mean."""
    count = jnp.maximum(count_tokens(text["loss_mask"]), 1)

    def loss(policy: Params) -> tuple[Array, Array]:
        logprobs = replace(u.forwards["policy"], temperature=1.0).outputs(policy, text, 1).logprobs
        assert logprobs is not None
        nll = -masked_sum(logprobs, text["loss_mask"]) / count
        return u.plan.text_coef * nll, nll

    return jax.grad(loss, has_aux=True)(policy)


def _accumulate(
    u: Update, params: dict[str, Params], minibatch: Batch, denominators: dict[str, Array], rows_before: int
) -> tuple[PyTree, dict[str, Array], dict[str, Array]]:
    """Gradients, metrics that add and metrics that take the largest, over the micro-batches of one step.

    ``rows_before`` is what the minibatch had before ``prepare``, which drops the same share of every unit.
    """

    unit = max(1, u.algorithm.unit * minibatch["tokens"].shape[0] // rows_before)

    def loss(params: dict[str, Params], rows: Batch) -> tuple[Array, tuple[dict, dict]]:
        outputs = tree_outputs(u.forwards, u.algorithm, params, rows, u.plan.head_from)
        terms = _real_terms(u.algorithm, unit, outputs, rows) if "real" in rows else u.algorithm.loss(outputs, rows)
        extra, peaks = _diagnostics(outputs.logprobs, rows)
        value = total(terms, denominators)
        sums = {name: term.numerator / denominators[term.denominator] for name, term in {**terms, **extra}.items()}
        return value, ({"loss": value, **sums}, peaks)

    gradient = jax.grad(loss, has_aux=True)

    def add(carry: tuple, rows: Batch) -> tuple:
        gradients, (sums, peaks) = gradient(params, rows)
        return (
            jax.tree.map(jnp.add, carry[0], gradients),
            jax.tree.map(jnp.add, carry[1], sums),
            jax.tree.map(jnp.maximum, carry[2], peaks),
        )

    if u.plan.micro_batches == 1:
        gradients, (sums, peaks) = gradient(params, jax.tree.map(lambda x: x[0], cut_rows(minibatch, 1, u.layout)))
        return gradients, sums, peaks
    if u.plan.bin_length is not None:
        packing = make_packing(minibatch, u.layout, u.plan.micro_batches, u.plan.bin_length, unit)
        places = pack(packing, u.layout, minibatch["valid"])
        take = partial(take_packed, packing, u.layout, minibatch, places)
        zeros = _zeros(jax.eval_shape(lambda: gradient(params, take(jnp.int32(0)))))
        return jax.lax.fori_loop(0, places.used, lambda number, carry: add(carry, take(number)), zeros)
    pieces = cut_rows(minibatch, u.plan.micro_batches, u.layout)
    zeros = _zeros(jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], pieces)))
    return jax.lax.scan(lambda carry, rows: (add(carry, rows), None), zeros, pieces)[0]


def _zeros(shapes: tuple) -> tuple:
    """Where gradients, sums and peaks begin."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], *shapes[1]))


def _real_terms(algorithm: Algorithm, unit: int, outputs: Outputs, rows: Batch) -> dict[str, Term]:
    """The terms of a micro-batch that has empty rows beside its real ones: numerators are sums over units."""
    named: dict[str, Term] = {}
    of_rows = {name: x for name, x in rows.items() if not name.startswith("bin_")}
    units = jax.tree.map(lambda x: x.reshape(-1, unit, *x.shape[1:]), (outputs, of_rows))

    def numerators(outputs: Outputs, rows: Batch) -> dict[str, Array]:
        named.update(algorithm.loss(outputs, rows))
        return {name: term.numerator for name, term in named.items()}

    each = jax.vmap(numerators)(*units)
    real = rows["real"].reshape(-1, unit)[:, 0]
    return {name: named[name]._replace(numerator=jnp.sum(jnp.where(real, x, 0))) for name, x in each.items()}


def _diagnostics(logprobs: Array | None, rows: Batch) -> tuple[dict[str, Term], dict[str, Array]]:
    """How far the policy is from the one that sampled: the first place to look when a run goes wrong."""
    if logprobs is None or "behavior_logprobs" not in rows:
        return {}, {}
    mask: Bool[Array, "b t"] = rows["loss_mask"]
    log_ratio = jax.lax.stop_gradient(jnp.where(mask, logprobs - rows["behavior_logprobs"], 0))
    terms = {
        "behavior_kl": Term(masked_sum(k3(rows["behavior_logprobs"], logprobs), mask), "tokens", 0.0),
        "logprob_gap": Term(masked_sum(jnp.abs(log_ratio), mask), "tokens", 0.0),
    }
    if "advantages" in rows:
        advantages = rows.get("raw_advantages", rows["advantages"])
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
