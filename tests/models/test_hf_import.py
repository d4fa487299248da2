"""Model folders of every shape, and what broken ones get."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from rljax.models.decoder import Model, Params
from rljax.models.hf import ModelFolderError, load_config, load_params, save_hf
from rljax.models.hf_folder import local_folder
from rljax.models.params import init_params
from tests.conftest import ROOT
from tests.models.tiny import layout, tiny_model

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model, Params]:
    """A small Qwen2: biases, two tables, transposed and head-shaped weights."""
    model = tiny_model("qwen2")
    params = init_params(model, layout(), seed=0)
    params["layers"] = {name: leaf + 0.01 * i for i, (name, leaf) in enumerate(params["layers"].items())}
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_hf(folder, model, params)
    return folder, model, params


@pytest.fixture
def folder(saved: tuple[Path, Model, Params], tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(saved[0], tmp_path / "model")


def change_tensors(folder: Path, **changes: Any) -> Tensors:
    """Rewrite the weights; None removes a tensor. Names have ``__`` for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, folder / "model.safetensors")
    return tensors


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def equal(a: Params, b: Params) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("mesh", ["1,1,1", "1,2,4"])
def test_every_tensor_arrives_where_it_belongs(saved: tuple[Path, Model, Params], mesh: str) -> None:
    folder, model, params = saved
    assert load_config(folder) == model
    loaded = load_params(folder, model, layout(mesh))
    assert equal(loaded, params)
    assert jax.tree.all(jax.tree.map(lambda x: x.sharding.mesh.size == layout(mesh).mesh.size, loaded))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_stored_dtypes(folder: Path, saved: tuple[Path, Model, Params], dtype: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.astype(dtype) for name, value in tensors.items()}, folder / "model.safetensors")
    expected = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), saved[2])
    assert equal(load_params(folder, saved[1], layout()), expected)


def test_weights_can_be_had_in_the_compute_dtype(saved: tuple[Path, Model, Params]) -> None:
    folder, model, params = saved
    loaded = load_params(folder, model, layout(), dtype=jnp.bfloat16)
    assert equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_several_files_with_an_index(folder: Path, saved: tuple[Path, Model, Params]) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert equal(load_params(folder, saved[1], layout()), saved[2])
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"the file b\.safetensors is missing"):
        load_params(folder, saved[1], layout())


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_tied_weights_stored_either_way(folder: Path, saved: tuple[Path, Model, Params], stored: str) -> None:
    change_config(folder, tie_word_embeddings=True)
    table = np.asarray(saved[2]["embed"])[:83]
    kept = {"embedding": (table, None), "head": (None, table), "both": (table, 0 * table)}[stored]
    change_tensors(folder, model__embed_tokens__weight=kept[0], lm_head__weight=kept[1])
    loaded = load_params(folder, load_config(folder), layout())
    assert "lm_head" not in loaded
    np.testing.assert_array_equal(loaded["embed"], saved[2]["embed"])


def test_buffers_of_old_checkpoints_are_passed_over(folder: Path, saved: tuple[Path, Model, Params]) -> None:
    buffer = np.ones(4, np.float32)
    change_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=buffer, model__rotary_emb__inv_freq=buffer)
    assert equal(load_params(folder, saved[1], layout()), saved[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, r"the tensor model\.norm\.weight is missing"),
        ({"lm_head__weight": None}, r"the tensor lm_head\.weight is missing"),
        ({"model__embed_tokens__weight": None}, r"the tensor model\.embed_tokens\.weight is missing"),
        ({"model__layers__2__self_attn__q_proj__bias": None}, r"the tensor model\.layers\.2\.self_attn\.q_proj\.bias"),
        ({"score__weight": np.ones((1, 32), np.float32)}, r"the tensor score\.weight has no place"),
        (
            {"model__layers__1__mlp__up_proj__weight": np.ones((32, 48), np.float32)},
            r"model\.layers\.1\.mlp\.up_proj\.weight has shape \(32, 48\); config\.json asks for \(48, 32\)",
        ),
        ({"model__norm__weight": np.ones(32, np.int8)}, r"model\.norm\.weight is I8; F32, F16, BF16 are read"),
    ],
)
def test_a_wrong_tensor_is_named(folder: Path, saved: tuple[Path, Model, Params], changes: Any, message: str) -> None:
    change_tensors(folder, **changes)
    with pytest.raises(ModelFolderError, match=message):
        load_params(folder, saved[1], layout())


@pytest.mark.parametrize("kept", [0, 5, 3000, -1])
def test_a_file_that_is_cut_off_is_named(folder: Path, saved: tuple[Path, Model, Params], kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelFolderError, match=r"model\.safetensors is cut off or no safetensors file"):
        load_params(folder, saved[1], layout())


def test_a_folder_without_a_file_says_which(folder: Path, saved: tuple[Path, Model, Params]) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match=r"has neither model\.safetensors nor"):
        load_params(folder, saved[1], layout())
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match=r"config\.json is not JSON"):
        load_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelFolderError, match=r"has no config\.json"):
        load_config(folder)
    with pytest.raises(ModelFolderError, match=r"/nowhere/model does not exist"):
        load_config("/nowhere/model")


def test_a_family_that_is_not_here_is_named(folder: Path) -> None:
    change_config(folder, model_type="mamba")
    with pytest.raises(ModelFolderError, match="no family for model_type 'mamba'; there are llama, mistral, qwen2"):
        load_config(folder)


def test_the_hub_without_a_network() -> None:
    with pytest.raises(ModelFolderError, match="'some/model' is not a local folder and could not be had"):
        load_config("some/model")


def test_a_hub_name_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = load_config("some/model")
    load_params("some/model", model, layout())
    assert [name for name, _ in asked] == ["some/model"] * 2
    assert "*.safetensors" not in asked[0][1] and "*.safetensors" in asked[1][1]


def test_a_bucket_is_copied_once(
    folder: Path, saved: tuple[Path, Model, Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bucket = epath.Path(folder)
    monkeypatch.setattr("rljax.models.hf_folder.epath.Path", lambda url: bucket)
    assert load_config("gs://bucket/model") == saved[1]
    (copy,) = tmp_path.glob("rljax-model-*")
    assert "model.safetensors" not in os.listdir(copy)
    assert equal(load_params("gs://bucket/model", saved[1], layout()), saved[2])
    before = (copy / "model.safetensors").stat().st_mtime_ns
    local_folder("gs://bucket/model", ["*.safetensors"])
    assert (copy / "model.safetensors").stat().st_mtime_ns == before


def test_a_bucket_whose_model_was_trained_further_is_copied_again(
    folder: Path, saved: tuple[Path, Model, Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights have the length of the old ones; an index of the old ones must not outlive them."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bucket = epath.Path(folder)
    monkeypatch.setattr("rljax.models.hf_folder.epath.Path", lambda url: bucket)
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = dict.fromkeys(load_file(weights), "model.safetensors")
    index.write_text(json.dumps({"weight_map": names}))
    load_params("gs://bucket/model", saved[1], layout())
    norm = np.full_like(load_file(weights)["model.norm.weight"], 3.0)
    change_tensors(folder, model__norm__weight=norm)
    os.utime(weights, (2e9, 2e9))
    index.unlink()
    loaded = load_params("gs://bucket/model", saved[1], layout())
    np.testing.assert_array_equal(loaded["final_norm"], norm)
    (copy,) = tmp_path.glob("rljax-model-*")
    assert sorted(os.listdir(copy)) == sorted(os.listdir(folder))


def test_host_memory_stays_within_two_tensors(tmp_path: Path) -> None:
    """Twelve layers of 16 MiB tensors, in a process of its own, whose peak is the kernel's; 1 MiB is Python's own."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.models.load_and_measure", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Tensors of real models are above malloc's threshold and go back to the kernel when they are freed.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["arrays"] > 36 * measured["largest"]
    assert measured["above"] <= 2 * measured["largest"] + 2**20, measured
