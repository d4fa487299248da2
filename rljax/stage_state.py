"""What a checkpoint holds of a stage."""

from typing import Any

import jax
import jax.numpy as jnp

from rljax.optim import state_shardings
from rljax.stages import Snapshot, Stage
from rljax.steps import TrainState


def saved(stage: Stage, state: TrainState) -> dict[str, Any]:
    tree: dict[str, Any] = {"train": state}
    if stage.moving_reference:
        tree["reference"] = stage.reference
    if stage.critic_mean is not None:
        tree["critic_mean"] = stage.critic_mean
    return {**tree, "past": stage.past} if stage.past else tree


def restored(stage: Stage, tree: dict[str, Any]) -> TrainState:
    """The state; what else was saved becomes the stage's."""
    if "reference" in tree:
        stage.frozen["reference"] = tree["reference"]
    stage.critic_mean = tree.get("critic_mean")
    stage.past = [Snapshot(*snapshot) for snapshot in tree.get("past", [])]
    return tree["train"]


def abstract_saved(stage: Stage) -> dict[str, Any]:
    """The shapes and places of ``saved``, for restoring without making a state first."""
    session = stage.session
    params = {tree: session.abstract_tree(model) for tree, model in stage.trees.items()}
    opt_state = jax.eval_shape(stage.optimizer.init, params)
    everywhere = session.train.replicated
    placed = jax.tree.map(_placed, opt_state, state_shardings(opt_state, stage.moment_shardings(), everywhere))
    step, algo_state = jax.eval_shape(lambda: (jnp.int32(0), stage.algorithm.init()))
    small = jax.tree.map(lambda x: _placed(x, everywhere), (step, algo_state))
    tree: dict[str, Any] = {"train": TrainState(small[0], params, placed, small[1])}
    if stage.moving_reference:
        tree["reference"] = session.abstract_policy(stage.frozen_dtype("reference"))
    if stage.algorithm.critic_ema:
        tree["critic_mean"] = params["critic"]
    if stage.online and stage.config.rollout.lag:
        snapshot = Snapshot(small[0], session.abstract_policy(session.dtype))
        tree["past"] = [snapshot] * stage.config.rollout.lag
    return tree


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
