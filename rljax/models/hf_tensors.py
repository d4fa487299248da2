"""How a leaf of the parameter tree lies in safetensors files: names, shapes, axis order, both ways."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from rljax.models.decoder import Model
from rljax.models.layers import Param
from rljax.models.params import declare

# The axes of a leaf's layer that each axis of the stored tensor holds, outermost first.
STORED_AXES: dict[str, tuple[tuple[int, ...], ...]] = {
    "transposed": ((1,), (0,)),
    "heads_out": ((1, 2), (0,)),
    "heads_in": ((2,), (0, 1)),
    "heads_bias": ((0, 1),),
}


class Leaf(NamedTuple):
    """One array of the tree: a tensor per layer where it is stacked, one otherwise. Shapes are without padding."""

    path: tuple[str, ...]
    names: tuple[str, ...]  # in a Hugging Face checkpoint; one per layer where ``stacked``
    stacked: bool
    shape: tuple[int, ...]  # of one layer
    stored_axes: tuple[tuple[int, ...], ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[axis] for axis in axes) for axes in self.stored_axes)

    @property
    def _order(self) -> tuple[int, ...]:
        return tuple(axis for axes in self.stored_axes for axis in axes)

    def stored_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slice of the stored tensor that holds ``index`` of the layer. Head widths are never cut."""

        def one(axes: tuple[int, ...]) -> slice:
            start, stop, _ = index[axes[0]].indices(self.shape[axes[0]])
            inner = math.prod(self.shape[axis] for axis in axes[1:])
            return slice(start * inner, stop * inner)

        return tuple(one(axes) for axes in self.stored_axes)

    def from_stored(self, stored: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """``stored_index(index)`` of the tensor to ``index`` of the layer: a view where that can be."""
        sizes = [len(range(*cut.indices(size))) for cut, size in zip(index, self.shape, strict=True)]
        return stored.reshape([sizes[axis] for axis in self._order]).transpose(np.argsort(self._order))

    def to_stored(self, layer: np.ndarray) -> np.ndarray:
        return layer.transpose(self._order).reshape(self.stored_shape)


def leaves(model: Model) -> list[Leaf]:
    """Every leaf, in the one order that all processes follow."""
    true_size = model._replace(config=dataclasses.replace(model.config, vocab_multiple=1))
    declared = declare(true_size)
    keys = model.family.hf_keys(model.config)

    def leaf(path: tuple[str, ...], param: Param) -> Leaf:
        key = keys[".".join(path)]
        stacked = path[0] == "layers"
        shape = param.shape[1:] if stacked else param.shape
        layers = range(model.config.num_layers)
        names = tuple(key.name.format(layer=layer) for layer in layers) if stacked else (key.name,)
        same = tuple((axis,) for axis in range(len(shape)))
        return Leaf(path, names, stacked, shape, same if key.kind == "same" else STORED_AXES[key.kind])

    top = [leaf((name,), param) for name, param in declared.items() if name != "layers"]
    return top + [leaf(("layers", name), param) for name, param in declared["layers"].items()]


def get(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
