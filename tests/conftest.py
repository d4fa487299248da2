"""Eight simulated devices, quick compilation, real data where it lies, nothing from a network; seconds by suite."""

import atexit
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

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


# Seconds of tests that ``make test`` may take, by folder or by the beginning of a file's name: 20 minutes of two cores.
BUDGET_S = {
    "algos": 120,
    "configs": 50,
    "data": 50,
    "losses": 180,
    "models": 150,
    "rewards": 30,
    "test_notebooks": 250,
    "test_processes": 80,
    "test_resume": 200,
    "test_tpu": 250,
    "test_truth": 250,
    "test": 790,
}


def suite_of(nodeid: str) -> str:
    """The suite of BUDGET_S that a test belongs to; a file goes to the longest name that it begins with."""
    path = nodeid.partition("::")[0].removeprefix("tests/")
    return max((suite for suite in BUDGET_S if path.startswith(suite)), key=len)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Where durations are asked for, also those of whole suites; a budget that is passed fails nothing."""
    if config.option.durations is None:
        return
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    seconds: Counter[str] = Counter()
    for report in reports:
        if isinstance(report, pytest.TestReport):
            seconds[suite_of(report.nodeid)] += report.duration
    terminalreporter.section("seconds by suite, over all processes, and the budget of make test")
    for suite, budget in BUDGET_S.items():
        if suite in seconds:
            terminalreporter.write_line(f"{seconds[suite]:8.1f} of {budget:4d}  {suite}")
    terminalreporter.write_line(f"{seconds.total():8.1f} of {sum(BUDGET_S.values()):4d}  all")


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
