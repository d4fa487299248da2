"""Eight simulated devices, quick compilation, real data where it lies, and nothing from a network."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from tests.tiny import PROGRAMS, QUICK_COMPILE

jax.config.update("jax_num_cpu_devices", 8)

if PROGRAMS not in os.environ:  # of the first process; the others find it there
    os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="rljax-tests-")
    atexit.register(shutil.rmtree, os.environ[PROGRAMS], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ[PROGRAMS])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_configure(config: pytest.Config) -> None:
    """Slow tests, which train, run what users run; the others are compiled quickly, unless somebody set flags."""
    if config.option.markexpr != "slow":
        os.environ.setdefault("XLA_FLAGS", QUICK_COMPILE["XLA_FLAGS"])


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
