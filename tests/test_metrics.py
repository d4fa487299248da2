"""Strict lines, each step once; a table that stays aligned over a progress bar; trackers; documented names."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rljax.metric_names import METRICS, document, is_measured, undocumented
from rljax.metrics import MetricsWriter

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parent.parent


def lines(path: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_docs_are_current():
    assert (ROOT / "docs" / "metrics.md").read_text() == document(), "see the second line of docs/metrics.md"


def test_every_metric_stands_in_the_document():
    text = document()
    assert all(f"| `{name}` | {meaning} |" in text for name, meaning in METRICS.items())


def test_undocumented_names_are_found():
    assert undocumented(["train/reward", "train/reward/format", "train/grad_norm/policy", "dev/pass_at_8"]) == []
    assert undocumented(["train/rewards", "reward", "eval/score"]) == ["train/rewards", "reward"]


def test_measured_names():
    assert [n for n in ("time/step_s", "dev/seconds", "speed/mfu", "memory/peak_gib") if not is_measured(n)] == []
    assert not is_measured("train/reward") and not is_measured("train/tokens")


def test_a_record_is_strict_json_with_exact_numbers(tmp_path):
    with MetricsWriter(tmp_path, console=False) as writer:
        third = np.float32(1) / np.float32(3)
        writer.write(1, "main", {"train/reward": jnp.float32(third), "train/prompts": np.int64(7), "n": 3, "ok": True})
        writer.write(2, "main", {"train/kl": float("nan"), "train/loss": -jnp.inf, "train/entropy": jnp.array([0.5])})
        assert len(lines(tmp_path / "metrics.jsonl")) == 2  # on disk before the writer is closed
    first, second = lines(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, "phase": "main", "train/reward": float(third), "train/prompts": 7, "n": 3, "ok": True}
    assert isinstance(first["train/prompts"], int)
    expected = {"train/kl": None, "train/loss": None, "train/entropy": 0.5, "nonfinite": 2}
    assert second == {"step": 2, "phase": "main", **expected}


def test_a_metric_is_a_single_number(tmp_path):
    with MetricsWriter(tmp_path, console=False) as writer, pytest.raises(ValueError, match=r"train/kl has shape \[2\]"):
        writer.write(1, "main", {"train/kl": np.zeros(2)})


def test_samples_are_strict_json_however_deep(tmp_path):
    row = {"token_ids": np.arange(3), "parts": {"format": float("nan"), "right": np.float32(1)}, "ids": (1, 2)}
    with MetricsWriter(tmp_path, console=False) as writer:
        writer.write_samples(4, "dev", [row, {"completion": "naïve\u2028✓"}])
    expected = {"token_ids": [0, 1, 2], "parts": {"format": None, "right": 1.0}, "ids": [1, 2]}
    text = (tmp_path / "samples.jsonl").read_text().split("\n")
    assert json.loads(text[0]) == {"step": 4, "phase": "dev", **expected}
    assert json.loads(text[1])["completion"] == "naïve\u2028✓"


def test_a_resumed_run_has_every_step_once(tmp_path):
    for first, last in ((1, 5), (4, 6)):  # killed after step 5, resumed from the checkpoint of step 3
        with MetricsWriter(tmp_path, console=False) as writer:
            writer.truncate_after(first - 1)
            for step in range(first, last + 1):
                writer.write(step, "main", {"train/reward": step / 10})
                writer.write_samples(step, "train", [{"completion": "x"}])
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in lines(tmp_path / "samples.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_other_processes_write_nothing(tmp_path, capfd):
    with MetricsWriter(tmp_path, is_writer=False) as writer:
        writer.truncate_after(0)
        writer.write(1, "main", {"train/reward": 1.0})
        writer.write_samples(1, "train", [{}])
        writer.event(1, "stopped")
        writer.say("hello")
        writer.flush()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


GRPO = {
    "train/reward": 0.5,
    "train/correct": 0.25,
    "train/loss": -0.0012,
    "train/completion_length": 48.25,
    "train/kl_per_completion": 0.031,
    "train/clip_fraction_low": 0.01,
    "train/clip_fraction_high": 0.02,
    "train/entropy": 1.5,
    "speed/tokens_per_s": 12345.6,
    "time/rollout_s": 1.25,
    "time/reward_s": 0.01,
    "time/score_s": 0.5,
    "time/update_s": 2.0,
}
HEADER = "step   reward  correct   length       kl  clipped  entropy tokens/s   t_roll t_reward  t_score t_update"
ROW = "  12    0.500    0.250     48.2    0.031   0.0300    1.500   12,346     1.25     0.01     0.50     2.00"


def test_the_table_is_aligned_and_says_what_a_reader_asks(tmp_path, capfd):
    with MetricsWriter(tmp_path, total_steps=200) as writer:
        writer.write(0, "eval", {"eval/score": 0.5, "eval/score_low": 0.457, "eval/score_high": 0.543, "eval/n": 512})
        writer.write(12, "main", GRPO)
        writer.write(13, "main", GRPO)
        writer.write(14, "sft", {"train/loss": 2.0, "speed/tokens_per_s": 10.0})
        writer.event(14, "stopped: KL")
    printed = capfd.readouterr()
    assert printed.err == ""  # no bar where standard error is no terminal
    assert printed.out.splitlines() == [
        "   0  eval score 0.500, 95 % interval 0.457 to 0.543, 512 problems",
        "kl in nats a completion, length in tokens, t_* in seconds; every metric is explained in docs/metrics.md",
        HEADER,
        ROW,
        ROW.replace("12 ", "13 ", 1),
        "step     loss tokens/s",
        "  14   2.0000       10",
        "stopped: KL",
    ]
    assert lines(tmp_path / "metrics.jsonl")[-1] == {"step": 14, "phase": "event", "event/text": "stopped: KL"}


def test_samples_of_an_evaluation_are_a_line_each_that_fits_the_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    rows = [
        {"prompt": "1+2=", "completion": "1+2=3;\n#3", "reward": 1.0},
        {"prompt": "Count from one: " + "one two " * 20 + "three", "completion": "four five " * 20, "reward": -0.25},
        {"prompt": "not", "completion": "shown", "reward": 0.0},
    ]
    with MetricsWriter(tmp_path) as writer:
        writer.show_samples(rows)
    short, long = capfd.readouterr().out.splitlines()
    assert short == "      1+2= -> 1+2=3; #3  (reward 1.000)"
    assert len(long) == 60 and long.startswith("      …") and " two three -> four five f" in long
    assert long.endswith("…  (reward -0.250)")


def test_a_long_run_repeats_its_header_and_prints_what_is_not_finite(tmp_path, capfd):
    with MetricsWriter(tmp_path, total_steps=60) as writer:
        for step in range(60):
            writer.write(step, "main", {"train/loss": float("nan")})
    printed = capfd.readouterr().out.splitlines()
    assert [i for i, line in enumerate(printed) if "loss" in line] == [1, 27, 53]
    assert printed[2].split() == ["0", "nan"]


def test_the_progress_bar_does_not_touch_the_lines(tmp_path):
    """On a terminal of its own: every line of the table stands alone between two drawings of the bar."""
    program = (
        "import sys\nfrom rljax.metrics import MetricsWriter\n"
        "with MetricsWriter(sys.argv[1], total_steps=20) as writer:\n"
        "    writer.truncate_after(10)\n"
        "    for step in range(11, 21): writer.write(step, 'main', {'train/reward': step / 20, 'train/entropy': 1.0})\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)],
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        screen = b""
        try:
            while chunk := os.read(ours, 4096):
                screen += chunk
        except OSError:  # Linux says so when the other end is closed
            pass
        os.close(ours)
    assert process.returncode == 0
    text = screen.decode()
    assert re.search(r"1[0-9]/20 \[", text), "the bar begins at the resumed step"
    shown = [line.rsplit("\r", 1)[-1].replace("\x1b[A", "").rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    rows = [line for line in shown if re.match(r" +\d+ ", line)]
    assert rows == [f"{step:4d} {step / 20:8.3f}    1.000" for step in range(11, 21)]


class Recorder:
    """Stands in for tensorboardX.SummaryWriter and for a run of Weights & Biases."""

    def __init__(self, *args, **kwargs):
        self.made, self.seen, self.closed = (args, kwargs), [], False

    def add_scalar(self, name, value, step):
        self.seen.append((step, {name: value}))

    def log(self, numbers, step):
        self.seen.append((step, numbers))

    def close(self):
        self.closed = True

    finish = close


def test_tensorboard_gets_the_finite_numbers(tmp_path, monkeypatch):
    made = []
    module = types.SimpleNamespace(SummaryWriter=lambda *a, **k: made.append(Recorder(*a, **k)) or made[-1])
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    with MetricsWriter(tmp_path, console=False, tensorboard=True) as writer:
        writer.truncate_after(6)
        writer.write(7, "main", {"train/reward": 0.5, "train/kl": float("nan"), "event/text": "x"})
    assert made[0].made == ((str(tmp_path / "tensorboard"),), {"purge_step": 7})
    assert made[0].seen == [(7, {"train/reward": 0.5}), (7, {"nonfinite": 1})]
    assert made[0].closed


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    made = []
    module = types.SimpleNamespace(init=lambda **k: made.append(Recorder(**k)) or made[-1])
    monkeypatch.setitem(sys.modules, "wandb", module)
    for step in (1, 2):
        with MetricsWriter(tmp_path, console=False, wandb=True, config={"seed": 1}) as writer:
            writer.write(step, "main", {"train/reward": 0.5})
    assert made[0].made[1]["id"] == made[1].made[1]["id"] and made[0].made[1]["resume"] == "allow"
    assert made[0].made[1]["config"] == {"seed": 1} and made[0].made[1]["name"] == tmp_path.name
    assert [m.seen for m in made] == [[(1, {"train/reward": 0.5})], [(2, {"train/reward": 0.5})]]


def test_a_missing_tracker_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"config.log.tensorboard needs a package: pip install 'rljax\[tracking\]'"):
        MetricsWriter(tmp_path, console=False, tensorboard=True)
