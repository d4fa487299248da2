"""Optimizers and learning-rate schedules from a config: one optax chain per tree of parameters.

Training holds one or several trees (``{"policy": ..., "critic": ...}``); each may have its own rate, schedule and clip.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rljax.types import PyTree

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]
Path = tuple[Any, ...]

RULES: dict[str, Callable[["OptimConfig"], optax.GradientTransformation]] = {
    "adamw": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "rmsprop": lambda c: optax.scale_by_rms(c.b2, c.eps, eps_in_sqrt=False),
    "sgd": lambda c: optax.trace(c.b1),
}
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How one tree of parameters is updated. Weight decay is decoupled (arXiv 1711.05101), as torch's AdamW has it."""

    learning_rate: float  # peak learning rate
    schedule: str = "constant"  # constant | linear | cosine | inverse_sqrt
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    warmup_fraction: float = 0.0  # warm-up as a fraction of all optimizer steps; set this or warmup_steps
    final_learning_rate: float = 0.0  # where linear and cosine end, and the lower bound of inverse_sqrt
    name: str = "adamw"  # adamw | rmsprop | sgd
    b1: float = 0.9  # adamw: decay of the first moment; sgd: momentum; not used by rmsprop
    b2: float = 0.999  # adamw, rmsprop: decay of the second moment
    eps: float = 1e-8  # added outside the square root
    weight_decay: float = 0.0  # times the learning rate; not applied to norms and biases
    decay_embeddings: bool = True  # apply weight decay to embeddings too
    clip_norm: float = 1.0  # largest norm of the tree's gradient; 0: no clipping
    freeze_steps: int = 0  # optimizer steps at the start in which the tree is not updated (critic-only phase)

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"optim.name {self.name!r} is not one of {', '.join(RULES)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        amounts = ("learning_rate", "final_learning_rate", "weight_decay", "clip_norm")
        for key in (*amounts, "warmup_steps", "freeze_steps"):
            if not vars(self)[key] >= 0:
                raise ValueError(f"optim.{key} is {vars(self)[key]}; it must be 0 or more")
        for key in ("b1", "b2", "warmup_fraction"):
            if not 0 <= vars(self)[key] < 1:
                raise ValueError(f"optim.{key} is {vars(self)[key]}; it must be at least 0 and below 1")
        if not self.eps > 0:
            raise ValueError(f"optim.eps is {self.eps}; it must be above 0")
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("optim.warmup_steps and optim.warmup_fraction are both set; give one of them")
        if self.schedule == "constant" and self.final_learning_rate:
            raise ValueError("optim.final_learning_rate does nothing on a constant schedule; name linear or cosine")
        if self.schedule == "inverse_sqrt" and not (self.warmup_steps or self.warmup_fraction):
            raise ValueError(
                "optim.schedule inverse_sqrt takes its time scale from the warm-up; set optim.warmup_steps"
            )


def make_schedule(config: OptimConfig, total_steps: int) -> Schedule:
    """Learning rate of optimizer step ``step`` (from 0) in a run of ``total_steps``.

    With w warm-up steps and n = step + 1 it is ``rate·n/(w+1)`` while step < w, so no step is spent at rate 0. Then
    linear and cosine fall with ``(step - w) / (total_steps - w)`` and would reach the final rate at ``total_steps``, as
    in transformers; inverse_sqrt is ``rate·sqrt((w+1)/n)`` (arXiv 1706.03762). Past the horizon the rate stays.
    """
    warmup = config.warmup_steps or round(config.warmup_fraction * total_steps)
    if warmup and warmup >= total_steps:
        raise ValueError(
            f"optim: {warmup} warm-up steps do not fit into a run of {total_steps} optimizer steps; "
            "lower optim.warmup_steps or train longer"
        )
    peak, final = config.learning_rate, config.final_learning_rate

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        number = jnp.asarray(step) + 1.0
        done = jnp.clip((number - 1 - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        after = {
            "constant": lambda: jnp.full_like(done, peak),
            "linear": lambda: final + (peak - final) * (1 - done),
            "cosine": lambda: final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "inverse_sqrt": lambda: jnp.maximum(peak * jnp.sqrt((warmup + 1) / number), final),
        }[config.schedule]()
        return jnp.where(number <= warmup, peak * number / (warmup + 1), after)

    return schedule


def decay_mask(params: PyTree, *, decay_embeddings: bool = True) -> PyTree:
    """True where weight decay applies: not on norms, biases and scalars, on embeddings only if asked.

    The path decides (``norm``, ``bias`` or ``embed`` in one of its names), because a norm of stacked layers is
    a matrix.
    """
    spared = ("norm", "bias") if decay_embeddings else ("norm", "bias", "embed")

    def decays(path: Path, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path).lower()
        return jnp.ndim(leaf) > 1 and not any(word in name for word in spared)

    return jax.tree_util.tree_map_with_path(decays, params)


class _Held(NamedTuple):
    steps: Int[Array, ""]
    inner: optax.OptState


def _hold(inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """No update and no moment for so many steps; ``inner`` then begins at its own step 0."""

    def update(updates: PyTree, state: _Held, params: PyTree | None = None) -> tuple[PyTree, _Held]:
        moved, after = inner.update(updates, state.inner, params)
        held = state.steps < steps
        moved = jax.tree.map(lambda x: jnp.where(held, 0, x), moved)
        after = jax.tree.map(lambda new, old: jnp.where(held, old, new), after, state.inner)
        return moved, _Held(optax.safe_increment(state.steps), after)

    return optax.GradientTransformation(lambda params: _Held(jnp.int32(0), inner.init(params)), update)


def _chain(config: OptimConfig, total_steps: int, clip: bool) -> optax.GradientTransformation:
    chain = _moving_chain(config, max(total_steps - config.freeze_steps, 1), clip)
    return _hold(chain, config.freeze_steps) if config.freeze_steps else chain


def _moving_chain(config: OptimConfig, total_steps: int, clip: bool) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if clip and config.clip_norm else optax.identity(),
        RULES[config.name](config),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda params: decay_mask(params, decay_embeddings=config.decay_embeddings)
        ),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )


def make_optimizer(
    configs: Mapping[str, OptimConfig], total_steps: int, *, clip_scope: str = "tree"
) -> optax.GradientTransformation:
    """One optimizer over ``{tree name: parameters}``, each tree by its own config.

    ``clip_scope`` "tree" clips every tree by its own norm, "joint" all trees by the norm of everything together, which
    takes one ``clip_norm`` for all. A gradient that is not finite goes through: the caller decides what becomes of it.
    """
    if clip_scope not in ("tree", "joint"):
        raise ValueError(f"optim.clip_scope {clip_scope!r} is not one of tree, joint")
    limits = {config.clip_norm for config in configs.values()}
    joint = clip_scope == "joint"
    if joint and len(limits) > 1:
        raise ValueError(f"optim.clip_scope joint needs one clip_norm for all trees, not {sorted(limits)}")

    def labels(params: Mapping[str, PyTree]) -> dict[str, str]:
        if set(params) != set(configs):
            raise ValueError(f"optim has configs for {sorted(configs)}, but the trained trees are {sorted(params)}")
        return {name: name for name in params}

    each = optax.partition({name: _chain(c, total_steps, not joint) for name, c in configs.items()}, labels)
    limit = max(limits) if joint else 0.0
    return optax.chain(optax.clip_by_global_norm(limit), each) if limit else each


def state_shardings(opt_state: PyTree, param_shardings: PyTree, replicated: Any) -> PyTree:
    """Shardings of an (abstract) optimizer state: a moment lies where its parameter lies, the rest is ``replicated``.

    A moment is found by its path, which ends with the whole path of its parameter.
    """
    where = dict(jax.tree_util.tree_flatten_with_path(param_shardings)[0])

    def place(path: Path, _: Any) -> Any:
        return next((where[path[i:]] for i in range(len(path)) if path[i:] in where), replicated)

    return jax.tree_util.tree_map_with_path(place, opt_state)


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Root of the sum of squares over all leaves, summed in float32 at least. An empty tree has norm 0."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def tree_norms(trees: Mapping[str, PyTree]) -> dict[str, Float[Array, ""]]:
    """The norm of every tree by name; on gradients as they come, before any clip."""
    return {name: global_norm(tree) for name, tree in trees.items()}


def update_ratios(updates: Mapping[str, PyTree], params: Mapping[str, PyTree]) -> dict[str, Float[Array, ""]]:
    """Norm of the update over the norm of the parameters, by tree; 0 where nothing was updated."""
    return {
        name: global_norm(updates[name]) / jnp.maximum(global_norm(params[name]), jnp.finfo(jnp.float32).tiny)
        for name in params
    }
