"""Hugging Face folders to parameters: one tensor at a time, each process reading only the slices that it holds."""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array
from safetensors import SafetensorError, safe_open

from rljax.models import FAMILIES
from rljax.models.decoder import Model, Params
from rljax.models.hf_config import ModelFolderError
from rljax.models.hf_folder import CONFIG_FILES, WEIGHT_FILES, local_folder, read_json
from rljax.models.hf_tensors import Leaf, get, leaves
from rljax.models.params import param_shardings
from rljax.sharding import Layout

READABLE = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints carry and the config already says.
IGNORED = ("rotary_emb.inv_freq",)


class Stored(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_config(path: str | os.PathLike) -> Model:
    """The family and config of a model folder. Raises ModelFolderError where it is none, or of a family not here."""
    config = read_json(local_folder(path) / "config.json")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ModelFolderError(
            f"{path}: no family for model_type {kind!r}; there are {', '.join(FAMILIES)} (see rljax/models/__init__.py)"
        )
    family = FAMILIES[kind]
    return Model(family, family.from_hf(config))


def load_params(path: str | os.PathLike, model: Model, layout: Layout, dtype: Any = jnp.float32) -> Params:
    """The weights of a model folder, placed by ``layout``; rows that pad the vocabulary are zero.

    Above the arrays themselves a process holds at most two tensors of host memory. All processes read in one order and
    must call this together. Raises ModelFolderError, before anything is placed, where a tensor is missing, extra, of
    another shape than config.json asks for, or in a file that is cut off.
    """
    stored = _list_tensors(local_folder(path, (*CONFIG_FILES, *WEIGHT_FILES)))
    tied = _tied_names(model)
    plan = [_choose_name(leaf, stored, tied) for leaf in leaves(model)]
    _check(path, plan, stored, tied)
    shardings = param_shardings(model, layout)
    params: Params = {"layers": {}}
    for leaf in plan:
        array = _load_leaf(leaf, stored, get(shardings, leaf.path), dtype, model)
        get(params, leaf.path[:-1])[leaf.path[-1]] = array
    return params


def _load_leaf(leaf: Leaf, stored: dict[str, Stored], sharding: NamedSharding, dtype: Any, model: Model) -> Array:
    if not leaf.stacked:
        rows = model.config.padded_vocab if len(leaf.shape) == 2 else leaf.shape[0]
        return _read_layer(leaf, stored[leaf.names[0]], leaf.names[0], (rows, *leaf.shape[1:]), sharding, dtype)
    layer_sharding = NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))
    begin, write = _stack_programs((len(leaf.names), *leaf.shape), dtype, sharding)
    stack = begin()
    for index, name in enumerate(leaf.names):
        layer = _read_layer(leaf, stored[name], name, leaf.shape, layer_sharding, dtype)
        # Waiting keeps the next tensor off the host until this one is in place.
        stack = jax.block_until_ready(write(stack, layer, index))
    return stack


@cache
def _stack_programs(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> tuple[Callable, Callable]:
    """Make a stack of layers, and write one of them in place; leaves of one shape share them."""

    def write(stack: Array, layer: Array, index: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)

    begin = partial(jnp.zeros, shape, dtype)
    return jax.jit(begin, out_shardings=sharding), jax.jit(write, out_shardings=sharding, donate_argnums=0)


def _read_layer(
    leaf: Leaf, tensor: Stored, name: str, shape: tuple[int, ...], sharding: NamedSharding, dtype: Any
) -> Array:
    """One tensor as a global array. Devices of this process that hold the same part share one read."""
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        if str(index) not in parts:
            parts[str(index)] = _read_part(leaf, tensor, name, shape, index, dtype)
        return parts[str(index)]

    return jax.make_array_from_callback(shape, sharding, part)


def _read_part(
    leaf: Leaf, tensor: Stored, name: str, shape: tuple[int, ...], index: tuple[slice, ...], dtype: Any
) -> np.ndarray:
    sizes = [len(range(*cut.indices(size))) for cut, size in zip(index, shape, strict=True)]
    stored_index = leaf.stored_index(index)
    if any(cut.start == cut.stop for cut in stored_index):
        return np.zeros(sizes, dtype)  # nothing but padding
    # Opened for each tensor, so that the pages mapped for the last one are let go.
    with safe_open(tensor.file, framework="numpy") as file:
        values = leaf.from_stored(file.get_slice(name)[stored_index], index)
    if list(values.shape) == sizes:
        return np.ascontiguousarray(values, dtype)
    padded = np.zeros(sizes, dtype)
    padded[: values.shape[0]] = values
    return padded


def _list_tensors(folder: Path) -> dict[str, Stored]:
    """Name to file, shape and dtype, from the headers alone."""
    found = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no iterator)
                    entry = tensors.get_slice(name)
                    found[name] = Stored(file, tuple(entry.get_shape()), entry.get_dtype())
        except FileNotFoundError:
            raise ModelFolderError(f"{folder}: the file {file.name} is missing") from None
        except (SafetensorError, OSError) as error:
            raise ModelFolderError(f"{file} is cut off or no safetensors file ({error}); copy it again") from None
    return found


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise ModelFolderError(f"{index} has no weight_map")
        return [folder / name for name in sorted(set(names.values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise ModelFolderError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json; other formats are not read, "
        "transformers' save_pretrained writes this one"
    )


def _tied_names(model: Model) -> tuple[str, ...]:
    """The two names under which a tied table may be stored; none where there are two tables."""
    keys = model.family.hf_keys(model.config)
    return (keys["embed"].name, keys["lm_head"].name) if model.config.tied_embeddings else ()


def _choose_name(leaf: Leaf, stored: dict[str, Stored], tied: tuple[str, ...]) -> Leaf:
    """A tied table under the name that the folder has, the embedding's where it has both."""
    if leaf.path != ("embed",):
        return leaf
    return next((leaf._replace(names=(name,)) for name in tied if name in stored), leaf)


def _check(path: str | os.PathLike, plan: list[Leaf], stored: dict[str, Stored], tied: tuple[str, ...]) -> None:
    wanted = {name: leaf for leaf in plan for name in leaf.names}
    for name, leaf in wanted.items():
        if name not in stored:
            raise ModelFolderError(f"{path}: the tensor {name} is missing")
        entry = stored[name]
        if entry.shape != leaf.stored_shape:
            raise ModelFolderError(
                f"{entry.file}: the tensor {name} has shape {entry.shape}; config.json asks for {leaf.stored_shape}"
            )
        if entry.dtype not in READABLE:
            raise ModelFolderError(f"{entry.file}: the tensor {name} is {entry.dtype}; {', '.join(READABLE)} are read")
    for name, entry in stored.items():
        if name not in wanted and name not in tied and not name.endswith(IGNORED):
            raise ModelFolderError(f"{entry.file}: the tensor {name} has no place in a model with this config.json")
