"""Import of Hugging Face folders: one tensor at a time, each process reading only the slices it holds."""

import json
import math
import mmap
import os
import struct
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

READABLE = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
# Buffers that old checkpoints carry and the config already says.
IGNORED = ("rotary_emb.inv_freq",)
SCORE_BIAS = ("score_bias",)


class Stored(NamedTuple):
    file: Path
    offset: int  # in bytes
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
    plan, stored = find_params(path, model)
    shardings = param_shardings(model, layout)
    params: Params = {"layers": {}}
    for leaf in plan:
        place = get(shardings, leaf.path)
        absent = leaf.path == SCORE_BIAS and leaf.names[0] not in stored
        array = jnp.zeros(leaf.shape, dtype, device=place) if absent else _load_leaf(leaf, stored, place, dtype)
        get(params, leaf.path[:-1])[leaf.path[-1]] = array
    return params


def find_params(path: str | os.PathLike, model: Model) -> tuple[list[Leaf], dict[str, Stored]]:
    """The leaves in the order of reading and where every tensor lies, from the files' headers alone.

    Raises ModelFolderError as ``load_params`` does: for a check before anything else is done.
    """
    stored = list_tensors(local_folder(path, (*CONFIG_FILES, *WEIGHT_FILES)))
    tied = _tied_names(model)
    plan = [_choose_name(leaf, stored, tied) for leaf in leaves(model)]
    _check(path, plan, stored, tied)
    return plan, stored


def _load_leaf(leaf: Leaf, stored: dict[str, Stored], sharding: NamedSharding, dtype: Any) -> Array:
    """Tensors travel as they are stored; the device turns and casts them."""
    convert, begin, write = _programs(leaf._replace(path=(), names=()), len(leaf.names), dtype, sharding)
    array = begin() if leaf.stacked else None
    for index, name in enumerate(leaf.names):
        tensor = _read(leaf, stored[name], leaf.stored_sharding(sharding))
        array = convert(tensor) if array is None else write(array, tensor, index)
        # Wait and let go, so that the next tensor comes to the host when this one has left it.
        jax.block_until_ready(array)
        del tensor
    assert array is not None
    return array


@cache
def _programs(leaf: Leaf, layers: int, dtype: Any, sharding: NamedSharding) -> tuple[Callable, Callable, Callable]:
    """A whole leaf from its tensor; an empty stack; a layer of a stack, in place. Leaves of one shape share them."""

    def convert(tensor: Array) -> Array:
        # A copy where nothing else is done: the tensor may be a view of the file.
        return jnp.array(leaf.from_stored(tensor), dtype, copy=True)

    def write(stack: Array, tensor: Array, index: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(stack, leaf.from_stored(tensor).astype(dtype), index, 0)

    begin = partial(jnp.zeros, (layers, *leaf.shape), dtype)
    placed = partial(jax.jit, out_shardings=sharding)
    return placed(convert), placed(begin), placed(write, donate_argnums=0)


def _read(leaf: Leaf, tensor: Stored, sharding: NamedSharding) -> Array:
    """One tensor as a global array, of which this process reads only its own slices; zeros pad the vocabulary."""
    with tensor.file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(pages, READABLE[tensor.dtype], math.prod(tensor.shape), tensor.offset).reshape(tensor.shape)

    def part(index: Any) -> np.ndarray:
        found = data[index]
        missing = len(range(*index[0].indices(leaf.padded_shape[0]))) - len(found)
        return np.pad(found, [(0, missing)] + [(0, 0)] * (found.ndim - 1)) if missing else found

    array = jax.block_until_ready(jax.make_array_from_callback(leaf.padded_shape, sharding, part))
    # The file's pages count as this process's memory until they are let go.
    pages.madvise(mmap.MADV_DONTNEED)
    return array


def list_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder, from the headers alone."""
    found = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="numpy"):
                pass  # the library's own checks, of the length against the header among them
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(length))
        except FileNotFoundError:
            raise ModelFolderError(f"{folder}: the file {file.name} is missing") from None
        except (SafetensorError, OSError) as error:
            raise ModelFolderError(f"{file} is cut off or no safetensors file ({error}); copy it again") from None
        header.pop("__metadata__", None)
        for name, entry in header.items():
            offset = 8 + length + entry["data_offsets"][0]
            found[name] = Stored(file, offset, tuple(entry["shape"]), entry["dtype"])
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
        if leaf.path == SCORE_BIAS and name not in stored:
            continue  # transformers' sequence classification has none
        if name not in stored and leaf.path == ("score",):
            raise ModelFolderError(
                f"{path} is no reward model: the tensor {name}, its scalar head, is missing; train one from it "
                "(algo reward_model), or start a new head with critic.init_from"
            )
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
