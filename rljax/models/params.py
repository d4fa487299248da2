"""Declared parameters: shapes, shardings, counts, and random initialisation in place."""

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from rljax.models.decoder import Model, Params
from rljax.models.layers import Param
from rljax.models.quantized import Quantized, quantize
from rljax.sharding import Layout


def declare(model: Model) -> dict[str, Any]:
    """Every parameter of a model: shape with padded vocabulary, logical axes, initialisation."""
    c = model.config
    stacked = {
        name: Param((c.num_layers, *p.shape), (None, *p.axes), p.init, p.summed)
        for name, p in model.family.declare_layer(c).items()
    }
    table = Param((c.padded_vocab, c.width), ("vocab", "embed"))
    tree = {"embed": table, "layers": stacked, "final_norm": Param((c.width,), (None,), "ones")}
    if model.scores:
        head = Param((model.scores, c.width), (None, None), "score" if model.scores == 1 else "zeros")
        return {**tree, "score": head, "score_bias": Param((model.scores,), (None,), "zeros")}
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


def quantized(model: Model, params: Params) -> Params:
    """int8 in place of the layers' weights, with a scale for each output channel; the other leaves as they are."""
    axes = {name: tuple(range(1, 1 + p.summed)) for name, p in declare(model)["layers"].items() if p.summed}
    layers = {name: quantize(x, axes[name]) if name in axes else x for name, x in params["layers"].items()}
    return {**params, "layers": layers}


def quantized_shardings(model: Model, layout: Layout) -> Params:
    """``param_shardings`` of what ``quantized`` gives."""

    def places(p: Param) -> Any:
        values = layout.sharding(p.axes, p.shape)
        if not p.summed:
            return values
        axes, shape = ((*of[:1], *of[1 + p.summed :]) for of in (p.axes, p.shape))
        return Quantized(values, layout.sharding(axes, shape))  # type: ignore[arg-type]

    return map_params(places, declare(model))


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
    leaves, tree = jax.tree.flatten(declare(model), is_leaf=_is_param)
    key = jax.random.key(seed)
    made = [_init_leaf(model, layout, p, jax.random.fold_in(key, i), dtype) for i, p in enumerate(leaves)]
    return jax.tree.unflatten(tree, made)


def init_scalar_head(model: Model, layout: Layout, seed: int, dtype: Any = jnp.float32) -> Params:
    """The leaves that a scalar model has beside a language model's body: normal with deviation 1/sqrt(D + 1), bias 0.

    The deviation is that of the TL;DR reproduction (2403.17031, detail 11).
    """
    key = jax.random.key(seed)
    leaves = {name: p for name, p in declare(model).items() if name.startswith("score")}
    return {
        name: _init_leaf(model, layout, p, jax.random.fold_in(key, i), dtype)
        for i, (name, p) in enumerate(leaves.items())
    }


def _init_leaf(model: Model, layout: Layout, p: Param, key: Array, dtype: Any) -> Array:
    c = model.config
    std = (c.width + 1) ** -0.5 if p.init == "score" else c.init_std
    return _leaf_program(p, c.vocab_size, dtype, layout.sharding(p.axes, p.shape))(key, std)


@cache
def _leaf_program(p: Param, vocab_size: int, dtype: Any, sharding: NamedSharding) -> Callable[[Array, float], Array]:
    """One for each shape, which leaves and models of that shape share."""

    def make(key: Array, std: float) -> Array:
        if p.init in ("ones", "zeros"):
            return jnp.full(p.shape, {"ones": 1.0, "zeros": 0.0}[p.init], dtype)
        # float32 draws whatever the dtype, so that float64 tests and float32 runs start from the same weights.
        values = std * jax.random.normal(key, p.shape, jnp.float32)
        if p.axes[0] == "vocab":
            values = jnp.where(jnp.arange(p.shape[0])[:, None] < vocab_size, values, 0)
        return values.astype(dtype)

    return jax.jit(make, out_shardings=sharding)
