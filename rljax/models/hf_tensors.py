"""The layout of parameters in safetensors files: names, shapes and axis order, both ways."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from rljax.models.decoder import HfKey, Model
from rljax.models.layers import Param
from rljax.models.params import declare

# The axes of a leaf's layer that each axis of the stored tensor holds, outermost first.
STORED_AXES: dict[str, tuple[tuple[int, ...], ...]] = {
    "transposed": ((1,), (0,)),
    "heads_out": ((1, 2), (0,)),
    "heads_in": ((2,), (0, 1)),
    "heads_bias": ((0, 1),),
}


# Of transformers' sequence classification, which knows no bias: it is stored where it is not 0.
SCALAR_KEYS = {"score": HfKey("score.weight", "same"), "score_bias": HfKey("score.bias", "same")}


class Leaf(NamedTuple):
    """One array of the tree: a tensor per layer where it is stacked, one otherwise."""

    path: tuple[str, ...]
    names: tuple[str, ...]  # in a Hugging Face checkpoint; one per layer where ``stacked``
    stacked: bool
    shape: tuple[int, ...]  # of one layer
    stored_axes: tuple[tuple[int, ...], ...]
    stored_shape: tuple[int, ...]  # without the rows that pad the vocabulary

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Of the stored tensor, with the rows that pad the vocabulary."""
        return _merge(self.shape, self.stored_axes)

    def stored_sharding(self, sharding: NamedSharding) -> NamedSharding:
        """For the stored tensor, so that making a layer of it moves nothing between devices. Head widths stay whole."""
        spec = sharding.spec[1:] if self.stacked else sharding.spec
        return NamedSharding(sharding.mesh, jax.P(*(spec[axes[0]] for axes in self.stored_axes)))

    def from_stored(self, stored: Array) -> Array:
        order = _flat(self.stored_axes)
        return stored.reshape([self.shape[axis] for axis in order]).transpose([int(axis) for axis in np.argsort(order)])

    def to_stored(self, layer: Array) -> Array:
        return layer.transpose(_flat(self.stored_axes)).reshape(self.padded_shape)


def _flat(axes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(axis for group in axes for axis in group)


def _merge(shape: tuple[int, ...], axes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis] for axis in group) for group in axes)


def leaves(model: Model) -> list[Leaf]:
    """Every leaf, in the one order that all processes follow."""
    declared = _by_path(model)
    true_size = _by_path(model._replace(config=dataclasses.replace(model.config, vocab_multiple=1)))
    keys = {**model.family.hf_keys(model.config), **SCALAR_KEYS}

    def leaf(path: tuple[str, ...], param: Param) -> Leaf:
        key, stacked = keys[".".join(path)], path[0] == "layers"
        shape = param.shape[stacked:]
        axes = STORED_AXES.get(key.kind) or tuple((axis,) for axis in range(len(shape)))
        layers = range(model.config.num_layers if stacked else 1)
        return Leaf(
            path=path,
            names=tuple(key.name.format(layer=layer) for layer in layers),
            stacked=stacked,
            shape=shape,
            stored_axes=axes,
            stored_shape=_merge(true_size[path].shape[stacked:], axes),
        )

    return [leaf(path, param) for path, param in declared.items()]


def _by_path(model: Model) -> dict[tuple[str, ...], Param]:
    tree = declare(model)
    paths: dict[tuple[str, ...], Param] = {(name,): param for name, param in tree.items() if name != "layers"}
    return paths | {("layers", name): param for name, param in tree["layers"].items()}


def get(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
