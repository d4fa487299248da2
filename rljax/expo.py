"""ExPO (2404.16792): extrapolate weights beyond the trained ones, along the direction of training.

    python -m rljax.expo --weak SFT_FOLDER --strong TRAINED_FOLDER --alpha 0.3 --output FOLDER

θ = θ_strong + α(θ_strong − θ_weak) for every tensor. Alpha 0 is the strong model and -1 the weak one.
"""

import json
import os
import shutil
import struct
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rljax.models.hf_config import ModelFolderError
from rljax.models.hf_export import begin_folder, publish_folder
from rljax.models.hf_folder import CONFIG_FILES, WEIGHT_FILES, local_folder, read_json
from rljax.models.hf_import import READABLE, Stored, list_tensors

USER_ERROR = 2


def extrapolate(weak: str, strong: str, alpha: float, output: str) -> None:
    """Write the model folder ``output``: config, tokenizer and dtypes of ``strong``, its files' names and layout.

    Arithmetic is in float32, so that small differences of bfloat16 weights count; one tensor of each model is in memory
    at a time. Raises ModelFolderError, before anything is written, where tensors, shapes or vocabularies differ.
    """
    folders = [local_folder(name, (*CONFIG_FILES, *WEIGHT_FILES)) for name in (weak, strong)]
    start, end = (list_tensors(folder) for folder in folders)
    _check_tensors(folders, start, end)
    _check_vocabularies(folders)
    folder = begin_folder(output)
    try:
        for file in sorted(folders[1].iterdir()):
            if file.name in {tensor.file.name for tensor in end.values()}:
                mine = {name: tensor for name, tensor in end.items() if tensor.file.name == file.name}
                _write_file(folder / file.name, mine, start, alpha)
            elif file.is_file() and any(file.match(pattern) for pattern in (*CONFIG_FILES, *WEIGHT_FILES[1:])):
                shutil.copyfile(file, folder / file.name)
        publish_folder(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def extrapolated(start: np.ndarray, end: np.ndarray, alpha: float) -> np.ndarray:
    """end + alpha (end − start) in float32, in the dtype of ``end``; to the bit ``end`` where alpha is 0."""
    if not alpha:
        return end
    wide = end.astype(np.float32)
    return (wide + np.float32(alpha) * (wide - start.astype(np.float32))).astype(end.dtype)


def _check_tensors(folders: Sequence[Path], start: dict[str, Stored], end: dict[str, Stored]) -> None:
    weak, strong = folders
    for name in sorted({*start, *end}):
        if name not in start or name not in end:
            where, other = (strong, weak) if name in end else (weak, strong)
            raise ModelFolderError(f"the tensor {name} is in {where} and not in {other}; give two stages of one model")
        if start[name].shape != end[name].shape:
            raise ModelFolderError(
                f"the tensor {name} has shape {start[name].shape} in {weak} and {end[name].shape} in {strong}; "
                "give two stages of one model"
            )
        for tensor in (start[name], end[name]):
            if tensor.dtype not in READABLE:
                raise ModelFolderError(f"{tensor.file}: the tensor {name} is {tensor.dtype}; weights are real numbers")


def _check_vocabularies(folders: Sequence[Path]) -> None:
    """One tokenizer, where both folders have one: rows of the embedding stand for the same tokens."""
    files = [folder / "tokenizer.json" for folder in folders]
    if not all(file.exists() for file in files):
        return
    vocabularies = [
        (content.get("model", {}).get("vocab"), [(t["id"], t["content"]) for t in content.get("added_tokens", [])])
        for content in map(read_json, files)
    ]
    if vocabularies[0] != vocabularies[1]:
        raise ModelFolderError(f"{files[0]} and {files[1]} differ in their tokens; give two stages of one model")


def _write_file(path: Path, tensors: dict[str, Stored], start: dict[str, Stored], alpha: float) -> None:
    """One safetensors file: the header's length, the header, and the tensors, each computed when its turn comes."""
    ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        size = int(np.prod(tensor.shape)) * np.dtype(READABLE[tensor.dtype]).itemsize
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            file.write(extrapolated(_read(start[name]), _read(tensor), alpha).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _read(tensor: Stored) -> np.ndarray:
    """Flat, as it is stored."""
    count = int(np.prod(tensor.shape))
    return np.fromfile(tensor.file, READABLE[tensor.dtype], count, offset=tensor.offset)


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m rljax.expo", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--weak", required=True, help="the model before preference training: a folder or a Hub name")
    parser.add_argument("--strong", required=True, help="the model after it")
    parser.add_argument("--alpha", type=float, required=True, help="how far beyond; 0.3 to 0.5 in the paper")
    parser.add_argument("--output", required=True, help="the folder to write")
    options = parser.parse_args(argv)
    try:
        if not np.isfinite(options.alpha):
            raise ValueError(f"--alpha is {options.alpha}; it is a finite number, 0.3 to 0.5 in the paper")
        extrapolate(options.weak, options.strong, options.alpha, options.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    print(f"{options.output}: {options.strong} and {options.alpha:g} times its difference to {options.weak}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
