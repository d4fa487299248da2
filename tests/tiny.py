"""The smallest whole run: as a config for this process, as a command for others, and what it leaves behind."""

import json
import os
import random
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rljax.config import default_config
from rljax.metric_names import is_measured
from rljax.rewards.base import Score
from tests.configs import tiny

ROOT = Path(__file__).resolve().parent.parent

# Level 0 without fusion emitters takes 35 CPU seconds where level 0 alone takes 58 (LOG.md, 2026-11-29); what two runs
# have in common does not depend on it.
QUICK_COMPILE = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
if version("jaxlib").startswith("0.10."):  # later ones do not know the flag, and end the process
    QUICK_COMPILE["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
AS_USERS = {"XLA_FLAGS": ""}  # for start and run: the programs that users have
PROGRAMS = "RLJAX_TEST_PROGRAMS"  # names the folder of the programs that were compiled in this test session


def tiny_config(**overrides: Any) -> ConfigDict:
    """tests/configs/tiny.py with other values: ``tiny_config(steps=2, **{"algo.kl_coef": 0.0})``."""
    config = tiny.get_config()
    config.update_from_flattened_dict(overrides)
    return config


def tiny_command(folder: Path, module: tuple[str, ...] = ("rljax.main",), **overrides: Any) -> list[str]:
    """The command, to be run in ROOT, that does the same from a shell."""
    overrides = {"output_dir": folder, "compilation_cache": programs(), **overrides}
    settings = [f"--config.{key}={value}" for key, value in overrides.items()]
    return [sys.executable, "-W", "ignore", "-m", *module, "--config", "tests/configs/tiny.py", *settings]


def start(command: list[str], log: Path, **env: str) -> subprocess.Popen:
    """The command as a process of its own, which says what it has to say in ``log``."""
    with log.open("w") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **QUICK_COMPILE, **env}, stdout=out, stderr=subprocess.STDOUT
        )


def run(command: list[str], log: Path, **env: str) -> int:
    """The exit status of the command, negative for a signal."""
    process = start(command, log, **env)
    try:
        return process.wait(timeout=600)
    finally:
        process.kill()


def programs() -> Path:
    """Compiled programs of this test session, for all its processes."""
    return Path(os.environ[PROGRAMS])


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def left_behind(folder: Path) -> dict[str, Any]:
    """What a finished run wrote, but for measurements and for events: equal for equal runs, to the last bit.

    Of the final state it has the checksum of every leaf, of the policy the exported file too.
    """
    records = [record for record in lines(folder) if record["phase"] != "event"]
    newest = max(int(step.name) for step in (folder / "checkpoints").iterdir() if step.name.isdigit())
    return {
        "metrics": [{k: v for k, v in record.items() if not is_measured(k)} for record in records],
        "samples": lines(folder, "samples.jsonl"),
        "state": json.loads((folder / "checkpoints" / str(newest) / "record" / "metadata").read_text()),
        "policy": (folder / "model" / "model.safetensors").read_bytes(),
    }


def even_share(prompt: str, completion: str) -> Score:
    """A reward that random weights get a part of at once: the share of even digits, right from a half on."""
    share = sum(c in "02468" for c in completion) / max(len(completion), 1)
    return Score(share, correct=share >= 0.5)


def slow_share(prompt: str, completion: str) -> Score:
    """The same, in a time that leaves room for a kill."""
    time.sleep(0.05)
    return even_share(prompt, completion)


def any_number(prompt: str, completion: str) -> float:
    """A reward that no two processes, and no two runs, agree about."""
    return random.SystemRandom().random()


# Every algorithm on rows of comparisons, with a setting that learns eight rows by heart.
OFFLINE: dict[str, dict[str, Any]] = {
    "aot": {"beta": 0.5, "paired": True},
    "bco": {"beta": 0.5},
    "cpo": {"beta": 0.5, "nll_coef": 1.0},
    "dpo": {"beta": 0.5},
    "kto": {"beta": 0.5},
    "orpo": {"odds_coef": 0.5},
    "prefix_reward_model": {},
    "reward_model": {"loss": "bradley_terry"},
    "simpo": {"beta": 2.0, "gamma": 0.5},
}


def offline_config(algo: str, folder: Path, **overrides: Any) -> ConfigDict:
    """The tiny model on pairs of right and wrong sums: ``offline_config("dpo", tmp_path, steps=2)``."""
    base, config = tiny.get_config(), default_config(algo)
    with config.unlocked():
        config.update({name: base[name] for name in ("tokenizer", "model", "data", "eval", "checkpoint")})
    settings = {
        **{f"algo.{name}": value for name, value in OFFLINE[algo].items()},
        **{f"data.{split}": "arithmetic_pairs" for split in ("train", "dev", "test")},
        "mesh": "1,1,1",
        "output_dir": str(folder),
        "steps": 4,
        "batch.rows": 8,
        "optim.learning_rate": 1e-2,
    }
    config.update_from_flattened_dict({**settings, **overrides})
    return config


# What a digit is worth in ``hidden_linear``; a reward model sees pairs only.
HIDDEN_WEIGHTS = dict(zip("0123456789", (0.9, -1.2, 0.4, 1.5, -0.3, -0.8, 1.1, -1.6, 0.2, 0.7), strict=True))


def hidden_linear(prompt: str, completion: str) -> float:
    """A reward that is linear in the counts of the digits."""
    return sum(HIDDEN_WEIGHTS.get(c, 0.0) for c in completion)
