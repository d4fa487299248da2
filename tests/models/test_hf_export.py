"""Folders written: whole or not at all, in shards, without padding, by several processes together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from etils import epath
from safetensors.numpy import load_file

from rljax.models.decoder import Model, Params
from rljax.models.hf import ModelFolderError, load_config, load_params, save_hf
from rljax.models.params import init_params, param_shardings, parameter_count
from tests.conftest import ROOT
from tests.models.tiny import layout, tiny_model


@pytest.fixture(scope="module")
def made() -> tuple[Model, Params]:
    model = tiny_model("qwen3", tie_word_embeddings=True).padded_for(4)
    return model, jax.device_put(init_params(model, layout(), seed=0), param_shardings(model, layout("1,2,4")))


def equal(a: Params, b: Params) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_what_is_written(made: tuple[Model, Params], tmp_path: Path) -> None:
    model, params = made
    save_hf(tmp_path / "out", model, params)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.size for tensor in tensors.values()) == parameter_count(model)
    assert "lm_head.weight" not in tensors and tensors["model.embed_tokens.weight"].shape == (83, 32)
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.q_proj.weight"], np.asarray(params["layers"]["q"][1]).reshape(32, 64).T
    )
    assert equal(load_params(tmp_path / "out", load_config(tmp_path / "out").padded_for(4), layout()), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(made: tuple[Model, Params], tmp_path: Path, dtype: str) -> None:
    model, params = made
    save_hf(tmp_path / "out", model, params, dtype=dtype)
    loaded = load_params(tmp_path / "out", model, layout())
    assert equal(loaded, jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(again.dtype) == f"torch.{dtype}"


def test_shards_with_an_index(made: tuple[Model, Params], tmp_path: Path) -> None:
    model, params = made
    save_hf(tmp_path / "out", model, params, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 4 * parameter_count(model)
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert set(tensors) == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
    assert equal(load_params(tmp_path / "out", model, layout()), params)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_tokenizer_and_end_tokens_travel_along(data_dir: Path, tmp_path: Path) -> None:
    source = data_dir / "models" / "stories260K-hf"
    model = load_config(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    special = {"bos_token_id": 1, "eos_token_id": [1, 2]}
    save_hf(tmp_path / "out", model, load_params(source, model, layout()), tokenizer, {**special, "max_new_tokens": 9})
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.max_new_tokens) == (1, [1, 2], 9)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [1, 2]
    text = "Once upon a time"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text) == tokenizer(text)


class _Broken:
    def save_pretrained(self, folder: Path) -> None:
        raise OSError("disk full")


def test_a_failed_export_leaves_what_was_there(made: tuple[Model, Params], tmp_path: Path) -> None:
    model, params = made
    save_hf(tmp_path / "out", model, params)
    other = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(OSError, match="disk full"):
        save_hf(tmp_path / "out", model, other, _Broken())
    assert os.listdir(tmp_path) == ["out"]
    assert equal(load_params(tmp_path / "out", model, layout()), params)
    save_hf(tmp_path / "out", model, other)
    assert os.listdir(tmp_path) == ["out"]
    assert equal(load_params(tmp_path / "out", model, layout()), other)


def test_what_is_no_model_folder_is_not_replaced(made: tuple[Model, Params], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ModelFolderError, match="exists and is no model folder"):
            save_hf(path, *made)
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(ValueError, match="cannot store weights as 'int8'; float32, float16, bfloat16 can be"):
        save_hf(tmp_path / "out", *made, dtype="int8")


def test_a_bucket_gets_config_last(made: tuple[Model, Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []

    class Bucket(type(epath.Path("."))):  # type: ignore[misc]
        def copy(self, target: Any, overwrite: bool = False) -> Any:
            copied.append(self.name)
            return super().copy(target, overwrite=overwrite)

    bucket = tmp_path / "bucket"
    monkeypatch.setattr(
        "rljax.models.hf_export.epath.Path", lambda path: Bucket(bucket if "://" in str(path) else path)
    )
    save_hf("gs://bucket/model", *made, max_shard_bytes=60_000)
    assert copied[-2:] == ["model.safetensors.index.json", "config.json"]
    copied.clear()
    save_hf("gs://bucket/model", *made)  # of the first nothing may stay, least of all its index
    assert copied == ["model.safetensors", "config.json"] and sorted(os.listdir(bucket)) == sorted(copied)
    assert equal(load_params(bucket, made[0], layout()), made[1])


def test_two_processes_load_and_save_together(made: tuple[Model, Params], tmp_path: Path) -> None:
    """Tensor across the processes: neither holds a whole weight."""
    model, params = made
    save_hf(tmp_path / "in", model, params)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.models.load_and_save", f"localhost:{port}", str(tmp_path)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [*command, str(i)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(2)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    first, second = (tmp_path / name / "model.safetensors" for name in ("in", "out"))
    assert first.read_bytes() == second.read_bytes()
    assert load_config(tmp_path / "out") == load_config(tmp_path / "in")
