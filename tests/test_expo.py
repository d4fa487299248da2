"""ExPO on real folders: exact at alpha 0, the weak model at -1, linear between, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rljax.expo import extrapolated, main

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
SHAPES = ((11, 4), (6, 4), (4,))


def write_model(folder: Path, seed: int, vocab: dict[str, int], dtype: Any = np.float32, shards: int = 1) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in zip(NAMES, SHAPES, strict=True)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        files = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
        for file, name in zip(files, NAMES, strict=True):
            save_file({name: tensors[name]}, folder / file)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict(zip(NAMES, files, strict=True))})
        )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    (folder / "training_args.bin").write_bytes(b"not a model")
    return folder


def read(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def run(weak: Path, strong: Path, alpha: float, output: Path) -> int:
    return main(["--weak", str(weak), "--strong", str(strong), f"--alpha={alpha}", f"--output={output}"])


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return write_model(tmp_path / "weak", 0, {"a": 0}, shards=3), write_model(
        tmp_path / "strong", 1, {"a": 0}, shards=3
    )


def test_alpha_0_is_the_strong_model_and_minus_1_the_weak_one(models: tuple[Path, Path], tmp_path: Path) -> None:
    weak, strong = models
    assert run(weak, strong, 0.0, tmp_path / "zero") == run(weak, strong, -1.0, tmp_path / "back") == 0
    for name in NAMES:
        assert read(tmp_path / "zero")[name].tobytes() == read(strong)[name].tobytes()
        np.testing.assert_allclose(read(tmp_path / "back")[name], read(weak)[name], rtol=1e-6, atol=1e-6)
    names = sorted(file.name for file in (tmp_path / "zero").iterdir())
    assert names == sorted(
        f.name for f in strong.iterdir() if f.suffix != ".bin"
    )  # config, tokenizer, index and shards
    assert (tmp_path / "zero" / "config.json").read_bytes() == (strong / "config.json").read_bytes()


def test_linear_in_alpha(models: tuple[Path, Path], tmp_path: Path) -> None:
    weak, strong = models
    for alpha in (0.3, 0.9):
        assert run(weak, strong, alpha, tmp_path / str(alpha)) == 0
    for name in NAMES:
        one, three = (read(tmp_path / alpha)[name] - read(strong)[name] for alpha in ("0.3", "0.9"))
        np.testing.assert_allclose(3 * one, three, atol=2e-6)
        np.testing.assert_allclose(one, 0.3 * (read(strong)[name] - read(weak)[name]), atol=1e-6)


def test_small_differences_of_bfloat16_count() -> None:
    """Neighbours around 1 differ by 2^-7; 3 of them times 0.5 is 1.5 neighbours, computed in float32 and rounded once.

    1 + 3/128 = 1.0234375; plus 0.5 * 3/128 = 1.03515625, half-way between 132/128 and 133/128: to the even 132.
    """
    start, end = (np.asarray([x], jnp.bfloat16) for x in (1.0, 1.0 + 3 / 128))
    out = extrapolated(start, end, 0.5)
    assert out.dtype == jnp.bfloat16 and out.astype(np.float32) == 132 / 128
    assert extrapolated(start, end, 0.0).tobytes() == end.tobytes()


def test_mixed_dtypes_take_the_strong_ones(tmp_path: Path) -> None:
    weak = write_model(tmp_path / "weak", 0, {})
    strong = write_model(tmp_path / "strong", 1, {}, dtype=np.float16)
    assert run(weak, strong, 0.5, tmp_path / "out") == 0
    for name in NAMES:
        start, end = read(weak)[name], read(strong)[name].astype(np.float32)
        np.testing.assert_array_equal(read(tmp_path / "out")[name], (end + 0.5 * (end - start)).astype(np.float16))


def test_what_is_no_pair_of_stages_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weak = write_model(tmp_path / "weak", 0, {"a": 0})
    other_vocab = write_model(tmp_path / "other_vocab", 1, {"b": 0})
    other_shape = write_model(tmp_path / "other_shape", 1, {"a": 0})
    tensors = read(other_shape)
    save_file({**tensors, NAMES[0]: np.zeros((12, 4), np.float32)}, other_shape / "model.safetensors")
    extra = write_model(tmp_path / "extra", 1, {"a": 0})
    save_file({**tensors, "lm_head.weight": np.zeros((11, 4), np.float32)}, extra / "model.safetensors")
    for strong, sentence in (
        (other_vocab, "differ in their tokens"),
        (other_shape, f"the tensor {NAMES[0]} has shape (11, 4) in {weak} and (12, 4) in"),
        (extra, "the tensor lm_head.weight is in"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        assert run(weak, strong, 0.3, tmp_path / "out") == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert run(weak, weak, float("nan"), tmp_path / "out") == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
