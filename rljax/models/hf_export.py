"""Export of parameters to a Hugging Face folder that transformers loads with the same logits."""

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jaxtyping import Array

from rljax.models.decoder import Model, Params
from rljax.models.hf_config import ModelFolderError
from rljax.models.hf_tensors import Leaf, get, leaves

STORED_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Tensor(NamedTuple):
    name: str
    leaf: Leaf
    layer: int  # of a stacked leaf; 0 of another


def save_hf(
    path: str | os.PathLike,
    model: Model,
    params: Params,
    tokenizer: Any = None,
    generation_config: dict[str, Any] | None = None,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
) -> None:
    """Write config, weights and, where given, generation config and tokenizer: what ``from_pretrained`` needs.

    All processes call this together: they gather one tensor at a time and process 0 writes it, so that host memory
    stays at one tensor. The vocabulary's padding is left out and a tied table is stored once. The folder appears whole
    or not at all; a model folder of the same name is replaced, anything else in its place is an error.
    ``generation_config`` has bos_token_id, eos_token_id (one or several) and what else transformers' class takes.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"cannot store weights as {dtype!r}; {', '.join(STORED_DTYPES)} can be")
    writes = jax.process_index() == 0
    folder = begin_folder(path) if writes else None
    try:
        _write_weights(folder, model, params, dtype, max_shard_bytes)
        if folder is not None:
            _write_configs(folder, model, generation_config or {}, dtype)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            publish_folder(folder, path)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("save_hf")


def begin_folder(path: str | os.PathLike) -> Path:
    """An empty folder beside the final one, on the same file system; of a bucket in the temporary folder."""
    text = os.fspath(path)
    if "://" in text:
        return Path(tempfile.mkdtemp(prefix="rljax-export-"))
    target = Path(text)
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / "config.json").exists())):
        raise ModelFolderError(f"{target} exists and is no model folder; name another or move it away")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))


def publish_folder(folder: Path, path: str | os.PathLike) -> None:
    if "://" in os.fspath(path):
        # A bucket has no rename: config.json, without which nothing loads, goes first and comes back last.
        target = epath.Path(path)
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").unlink(missing_ok=True)
        for stale in target.glob("model*.safetensors*"):
            stale.unlink()
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
            epath.Path(file).copy(target / file.name, overwrite=True)
        return
    folder.chmod(0o755)
    if Path(path).exists():
        old = Path(tempfile.mkdtemp(prefix=f".{Path(path).name}.", dir=folder.parent))
        os.replace(path, old)
        os.replace(folder, path)
        shutil.rmtree(old)
    else:
        os.replace(folder, path)


def _write_configs(folder: Path, model: Model, generation_config: dict[str, Any], dtype: str) -> None:
    # Other readers than transformers look for the special tokens in config.json.
    special = {key: value for key, value in generation_config.items() if key.endswith("_token_id")}
    config = {**model.family.to_hf(model.config), **special, "torch_dtype": dtype}
    if model.scores:
        config |= _classifier(config, model.scores)
    _write_json(folder / "config.json", config)
    if generation_config and not model.scores:
        _write_json(folder / "generation_config.json", generation_config)


def _classifier(config: dict[str, Any], scores: int) -> dict[str, Any]:
    """What config.json says of a scalar model: transformers scores a row at its last token that is not padding."""
    names = {str(i): f"LABEL_{i}" for i in range(scores)}
    architecture = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    ends = config.get("eos_token_id")
    return {
        "architectures": [architecture],
        "id2label": names,
        "label2id": {name: int(i) for i, name in names.items()},
        **({"eos_token_id": ends[0]} if isinstance(ends, list) else {}),
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_weights(folder: Path | None, model: Model, params: Params, dtype: str, max_shard_bytes: float) -> None:
    """Every process runs through the same tensors; ``folder`` is None on those that do not write."""
    item_bytes = jnp.dtype(dtype).itemsize
    shards = _shards(_tensors(model, params), item_bytes, max_shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        arrays = (_host_tensor(tensor, params, dtype) for tensor in shard)
        if folder is None:
            for _ in arrays:
                pass
        else:
            with (folder / name).open("wb") as file:
                _write_safetensors(file, shard, arrays, dtype)
    if folder is not None and len(shards) > 1:
        total = sum(_size(tensor, item_bytes) for shard in shards for tensor in shard)
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _tensors(model: Model, params: Params) -> list[Tensor]:
    kept = [leaf for leaf in leaves(model) if leaf.path != ("score_bias",) or np.any(np.asarray(params["score_bias"]))]
    return [Tensor(name, leaf, layer) for leaf in kept for layer, name in enumerate(leaf.names)]


def _size(tensor: Tensor, item_bytes: int) -> int:
    return math.prod(tensor.leaf.stored_shape) * item_bytes


def _shards(tensors: Sequence[Tensor], item_bytes: int, max_bytes: float) -> list[list[Tensor]]:
    """In order, each as full as ``max_bytes`` allows; a tensor larger than that has a file of its own."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _size(tensor, item_bytes)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _host_tensor(tensor: Tensor, params: Params, dtype: str) -> np.ndarray:
    """As it is stored, on every process's host."""
    leaf, array = tensor.leaf, get(params, tensor.leaf.path)
    everywhere = None if array.is_fully_addressable else NamedSharding(array.sharding.mesh, jax.P())
    take = _take_program(leaf._replace(path=(), names=()), dtype, everywhere)
    return np.asarray(take(array, tensor.layer))[: leaf.stored_shape[0]]  # what is cut pads the vocabulary


@cache
def _take_program(leaf: Leaf, dtype: str, sharding: NamedSharding | None) -> Callable[[Array, int], Array]:
    def take(array: Array, layer: Array) -> Array:
        part = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) if leaf.stacked else array
        return leaf.to_stored(part).astype(dtype)

    return jax.jit(take, out_shardings=sharding)


def _write_safetensors(file: BinaryIO, shard: Sequence[Tensor], arrays: Iterator[np.ndarray], dtype: str) -> None:
    """The format is a length, a JSON header and the bytes; the library's own writer wants all arrays at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + _size(tensor, jnp.dtype(dtype).itemsize)
        header[tensor.name] = {
            "dtype": STORED_DTYPES[dtype],
            "shape": tensor.leaf.stored_shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for array in arrays:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
