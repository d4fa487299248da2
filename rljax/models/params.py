"""Parameters as declared: shapes, shardings, counts, and random weights born where they live."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rljax.models.decoder import DecoderConfig, Model, Params
from rljax.models.layers import Param
from rljax.sharding import Layout


def declare(model: Model) -> dict[str, Any]:
    """Every parameter of a model: shape with padded vocabulary, logical axes, initialisation."""
    c = model.config
    stacked = {
        name: Param((c.num_layers, *p.shape), (None, *p.axes), p.init)
        for name, p in model.family.declare_layer(c).items()
    }
    table = Param((c.padded_vocab, c.width), ("vocab", "embed"))
    tree = {"embed": table, "layers": stacked, "final_norm": Param((c.width,), (None,), "ones")}
    return tree if c.tied_embeddings else {**tree, "lm_head": table}


def map_params(f: Callable[[Param], Any], declared: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(f, declared, is_leaf=lambda leaf: isinstance(leaf, Param))


def param_shardings(model: Model, layout: Layout) -> Params:
    return map_params(lambda p: layout.sharding(p.axes, p.shape), declare(model))


def abstract_params(model: Model, layout: Layout, dtype: Any = jnp.float32) -> Params:
    """Shapes with shardings: the target of a checkpoint, the input of an ahead-of-time compilation."""
    return map_params(
        lambda p: jax.ShapeDtypeStruct(p.shape, dtype, sharding=layout.sharding(p.axes, p.shape)), declare(model)
    )


def parameter_count(model: Model) -> int:
    """Without the rows that pad the vocabulary."""
    true_size = model._replace(config=dataclasses.replace(model.config, vocab_multiple=1))
    return sum(
        math.prod(p.shape) for p in jax.tree.leaves(map_params(lambda p: p, declare(true_size)), is_leaf=_is_param)
    )


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, Param)


def init_params(model: Model, layout: Layout, seed: int, dtype: Any = jnp.float32) -> Params:
    """Random weights, born sharded. The values depend on the seed and the declaration alone, not on mesh or padding."""
    declared = declare(model)
    leaves, tree = jax.tree.flatten(declared, is_leaf=_is_param)

    def make(key: Array) -> Params:
        keys = [jax.random.fold_in(key, index) for index in range(len(leaves))]
        return jax.tree.unflatten(
            tree, [_init_leaf(model.config, p, k, dtype) for p, k in zip(leaves, keys, strict=True)]
        )

    return jax.jit(make, out_shardings=param_shardings(model, layout))(jax.random.key(seed))


def _init_leaf(c: DecoderConfig, p: Param, key: Array, dtype: Any) -> Array:
    if p.init == "ones":
        return jnp.ones(p.shape, dtype)
    if p.init == "zeros":
        return jnp.zeros(p.shape, dtype)
    # float32 draws whatever the dtype, so that float64 tests and float32 runs start from the same weights.
    values = c.init_std * jax.random.normal(key, p.shape, jnp.float32)
    if p.axes[0] == "vocab":
        values = jnp.where(jnp.arange(p.shape[0])[:, None] < c.vocab_size, values, 0)
    return values.astype(dtype)
