"""Loads a model of twelve wide layers and prints how far the process's memory rose above the arrays themselves."""

import gc
import json
import struct
import sys
from pathlib import Path

import jax

from rljax.models.hf import load_config, load_params
from rljax.models.hf_tensors import leaves
from tests.models.tiny import layout, tiny_model


def status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def write_model(folder: Path, width: int, layers: int) -> None:
    """All zeros: a hole in the file, which costs neither time nor disk."""
    model = tiny_model(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, vocab_size=4 * width)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.family.to_hf(model.config)))
    header, offset = {}, 0
    for leaf in leaves(model):
        for name in leaf.names:
            size = 4
            for dimension in leaf.stored_shape:
                size *= dimension
            header[name] = {"dtype": "F32", "shape": leaf.stored_shape, "data_offsets": [offset, offset + size]}
            offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def load(folder: Path) -> tuple[int, int]:
    params = jax.tree.leaves(load_params(folder, load_config(folder), layout()))
    return sum(leaf.nbytes for leaf in params), max(leaf[0].nbytes for leaf in params if leaf.ndim == 3)


def main(folder: Path) -> None:
    write_model(folder / "model", width=1024, layers=12)
    load(folder / "model")  # the second time nothing is compiled
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_bytes("VmRSS")
    arrays, largest = load(folder / "model")
    print(json.dumps({"arrays": arrays, "largest": largest, "above": status_bytes("VmHWM") - before - arrays}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
