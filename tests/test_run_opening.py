"""What a run counts of its data before it starts."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from rljax.config import make_config
from rljax.run import open_training
from rljax.session import open_session
from tests.tiny import lines, tiny_config

pytestmark = pytest.mark.fast


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_rows_are_counted_over_all_stages_and_without_held_out_ones(tmp_path: Path, capsys: Any) -> None:
    """Text for the warm start, of which one row has 40 tokens; three prompts for GRPO, one of them twice."""
    text = write_rows(tmp_path / "text.jsonl", [{"text": "1+2=3"}, {"text": "1" * 39}])
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": p, "answer": "3"} for p in ("1+2=", "2+1=", "1+2=")])
    config = tiny_config(output_dir=str(tmp_path / "run"))
    with config.unlocked():
        config.data.options = {}
        config.stages.warm_start.data = {"train": text, "train_rows": 0}
    config.data.train, config.data.dev, config.data.test = prompts, "", ""
    config.data.train_rows = config.data.dev_rows = config.data.test_rows = 0
    with open_training(open_session(make_config(config), jax.devices()[:1])):
        pass
    (record,) = (record for record in lines(tmp_path / "run") if record["phase"] == "data")
    assert (record["data/duplicates"], record["data/too_long"], record["data/overlap_exact"]) == (1, 1, 0)
    assert "stage warm_start: 1 rows kept, 1 dropped as longer than 32 tokens" in capsys.readouterr().out


def test_what_evaluation_shares_with_any_stage_or_split_is_said_with_the_rows(tmp_path: Path, capsys: Any) -> None:
    """Row 1 of dev is row 0 of the warm start's text, row 0 of test is mixed in and in dev, and GRPO's rows are new.

    What is mixed into both stages counts once.
    """

    def prompts(name: str, *texts: str) -> str:
        return write_rows(tmp_path / f"{name}.jsonl", [{"prompt": p, "answer": "3"} for p in texts])

    config = tiny_config(output_dir=str(tmp_path / "run"))
    with config.unlocked():
        config.data.options = {}
        config.stages.warm_start.data = {
            "train": write_rows(tmp_path / "text.jsonl", [{"text": "1+2="}, {"text": "5+5="}]),
            "train_rows": 0,
        }
    config.data.train = prompts("train", "1+1=", "2+2=")
    config.data.dev, config.data.test = prompts("dev", "3+3=", "1+2="), prompts("test", "3+3=", "4+4=")
    config.data.train_rows = config.data.dev_rows = config.data.test_rows = 0
    config.text_mix.coef, config.text_mix.row_length = 0.1, 32
    config.text_mix.train = write_rows(tmp_path / "mixed.jsonl", [{"text": "9+9="}, {"text": "3+3="}])
    with open_training(open_session(make_config(config), jax.devices()[:1])):
        pass
    (record,) = (record for record in lines(tmp_path / "run") if record["phase"] == "data")
    assert (record["data/overlap_exact"], record["data/overlap_8gram"], record["data/overlap_dev_test"]) == (3, 3, 1)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [(line.split(":")[1].strip(), line.partition("(rows ")[2]) for line in said] == [
        ("dev and training", "0 ~ text_mix of warm_start 1, 1 ~ stage warm_start 0)"),
        ("test and training", "0 ~ text_mix of warm_start 1)"),
        ("test and dev", "0 ~ dev 0)"),
    ]
