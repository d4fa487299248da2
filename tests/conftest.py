"""Eight simulated devices, real data where it lies, and nothing from a network."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models, tokenizers and data sets."""
    path = Path(os.environ.get("RLJAX_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(
            f"no real data: {path} is not a folder; set RLJAX_DATA to the folder that holds models/ and datasets/"
        )
    return path
