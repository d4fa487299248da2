"""Stages on comparisons, whole: every algorithm learns, references are scored once, runs go on, rewards are centred."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from rljax.config import ConfigError, make_config
from rljax.data.arithmetic import make_pairs
from rljax.data.batches import DataPosition
from rljax.data.rows import DataError
from rljax.models.hf import ModelFolderError, save_hf
from rljax.models.params import init_params
from rljax.offline import load_reference_caches, open_comparisons
from rljax.run import Run, finish, open_training
from rljax.session import open_session
from rljax.setup import make_source
from rljax.stage_steps import offline_step
from rljax.stages import Stage, build_stage
from rljax.trainer import train
from tests.models.tiny import layout
from tests.tiny import OFFLINE, lines, offline_config


def opened(config: Any) -> Run:
    return open_training(open_session(make_config(config), jax.devices()[:1]))


def trained(config: Any) -> list[dict[str, Any]]:
    """The records of a whole run."""
    with opened(config) as run:
        train(run)
        finish(run)
    return lines(Path(config.output_dir))


def built(run: Run) -> Stage:
    return build_stage(run.session, run.config, 0, run.sources[0], None)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# -- every algorithm


# One of each kind of rows always, and where rows are dropped; the others with the slow tests.
QUICK = ("dpo", "kto", "reward_model")
EVERY = [algo if algo in QUICK else pytest.param(algo, marks=pytest.mark.slow) for algo in OFFLINE]


@pytest.mark.parametrize("algo", EVERY)
def test_it_learns_its_rows_by_heart(algo: str, tmp_path: Path) -> None:
    """Eight rows, twelve steps: the loss falls, and at the end the comparisons are in order.

    Prefixes that right and wrong answers share have both labels.
    """
    settings: dict[str, Any] = {"data.dev": "", "data.dev_rows": 0, "data.test": "", "data.train_rows": 8}
    if algo == "prefix_reward_model":
        pairs = make_pairs(split="train", count=4, difficulty=1)
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in pairs
            for side in ("chosen", "rejected")
        ]
        settings |= {"data.train": write_rows(tmp_path / "rows.jsonl", rows), "data.options": {}}
    stage = {"steps": 12, "checkpoint.export": False, "checkpoint.keep_best": False, **settings}
    records = [r for r in trained(offline_config(algo, tmp_path / "run", **stage)) if r["phase"] == "main"]
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    assert not any(r["train/skipped"] for r in records)
    if algo == "prefix_reward_model":
        assert records[-1]["train/accuracy"] >= records[0]["train/accuracy"] + 0.1
    elif "train/accuracy" in records[0]:
        assert records[-1]["train/accuracy"] >= max(0.9, records[0]["train/accuracy"])
        assert records[-1]["train/margin"] > records[0]["train/margin"]
    else:
        assert records[-1]["train/reward_desirable"] > records[-1]["train/reward_undesirable"] + 0.1


@pytest.mark.slow
def test_a_ranking_of_three_trains_in_one_unit(tmp_path: Path) -> None:
    pairs = make_pairs(split="train", count=8, difficulty=1)
    rows = [
        {"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"], "#"], "scores": [1, 2, 0]} for r in pairs
    ]
    rows[0] = {**rows[0], "completions": rows[0]["completions"][:2], "scores": [1, 2]}
    settings = {"algo.loss": "plackett_luce", "algo.answers": 3, "data.train": write_rows(tmp_path / "r.jsonl", rows)}
    settings |= {"data.dev": "", "data.dev_rows": 0, "data.test": "", "data.train_rows": 0, "data.options": {}}
    config = offline_config("reward_model", tmp_path / "run", steps=12, **settings, **{"checkpoint.export": False})
    records = [r for r in trained(config) if r["phase"] == "main"]
    assert records[-1]["train/loss"] < records[0]["train/loss"] and records[-1]["train/accuracy"] >= 0.9
    assert records[0]["train/prompts"] == 8


# -- the reference


def test_the_reference_is_scored_once_and_let_go(tmp_path: Path) -> None:
    """What is kept are the teacher-forced log-probs of the reference; the first loss is ln 2."""
    with opened(offline_config("dpo", tmp_path)) as run:
        stage = built(run)
        params = run.session.base_params()
        stage.freeze("reference", params)
        score = stage.program("score_reference", 1)
        rows = stage.source.take(DataPosition(), 8)[1]
        expected = np.asarray(score(stage.reference, {"tokens": rows.tokens, "valid": rows.valid}))
        open_comparisons(run, stage, "base", params)
        assert stage.reference is None
        kept = np.asarray(stage.reference_logprobs(rows))
        np.testing.assert_array_equal(kept, np.where(rows.loss_mask, expected, 0))

        state = stage.start({"policy": params})
        metrics = offline_step(stage, state, DataPosition(), 0).metrics
        np.testing.assert_allclose(metrics["train/loss"], math.log(2), rtol=1e-5)
        np.testing.assert_allclose(metrics["train/margin"], 0, atol=1e-5)

        again = built(run)
        assert load_reference_caches(run, again)
        np.testing.assert_array_equal(again.reference_logprobs(rows), kept)


def test_a_reference_that_moves_is_scored_at_every_step(tmp_path: Path) -> None:
    """TR-DPO with a fresh copy after every step: policy and reference agree, the loss stays at ln 2."""
    records = trained(offline_config("dpo", tmp_path, reference_reset_steps=1, **{"checkpoint.export": False}))
    losses = [r["train/loss"] for r in records if r["phase"] == "main"]
    np.testing.assert_allclose(losses, math.log(2), rtol=1e-5)
    scores = [r["dev/margin"] for r in records if "dev/margin" in r]
    np.testing.assert_allclose(scores[0], 0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["dpo", "bco"])
def test_a_run_that_was_left_goes_on_as_if_it_had_not(algo: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The state of BCO's shift and the kept reference included: all numbers are the same, to the last bit."""
    whole = trained(offline_config(algo, tmp_path / "whole"))
    config = offline_config(algo, tmp_path / "cut")
    with opened(config) as run:
        monkeypatch.setattr(run.preemption, "reached", lambda step: step == 2)
        train(run)
        assert run.progress.step == 2
    cut = trained(config)

    def numbers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [r for r in records if r["phase"] != "event"]
        return [{k: v for k, v in r.items() if not k.startswith(("time/", "speed/", "memory/"))} for r in kept]

    assert numbers(cut) == numbers(whole)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


# -- reward models


def test_a_reward_model_is_centred_exported_and_picks_among_samples(tmp_path: Path) -> None:
    """The mean score of the chosen answers is 0; transformers says the same, less the bias; best of 1 is the mean."""
    settings = {"critic.center_on": "chosen", "eval.samples": 4, "eval.temperature": 1.0, "data.train_rows": 16}
    settings["eval.greedy"] = True
    config = offline_config("reward_model", tmp_path, **settings, **{"reward.names": ("tests.tiny:even_share",)})
    records = trained(config)
    final = [r for r in records if "eval/accuracy" in r][-1]
    assert {"eval/score", "eval/margin_low", "eval/ece", "eval/length_accuracy"} <= final.keys()
    assert next(r["eval/best_of_1"] for r in records if "eval/best_of_1" in r) == final["eval/best_of_1"]
    assert 0 <= final["eval/best_of_4"] <= 1 and "eval/best_of_2_low" in final

    session = open_session(make_config(config), jax.devices()[:1])
    source = make_source(session, session.config)
    _, rows, _ = source.take(DataPosition(), len(source))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward_model")
    with torch.no_grad():
        tokens, valid = torch.tensor(rows.tokens), torch.tensor(rows.valid)
        scores = model(tokens, attention_mask=valid).logits[:, 0].numpy()
    text = next(r["event/text"] for r in records if "reference answers" in r.get("event/text", ""))
    mean = float(text.split()[-1])
    np.testing.assert_allclose(scores[0::2].mean(), mean, rtol=2e-3)  # the text has four digits
    with opened(config) as run:
        kept = run.load_scalar("main", session.scalar_model("main"))
    np.testing.assert_allclose(scores[0::2].mean(dtype=np.float64) + kept["score_bias"], 0, atol=1e-5)


# -- mistakes


def test_mistakes_are_told_before_anything_compiles(tmp_path: Path) -> None:
    equal = write_rows(tmp_path / "equal.jsonl", [{"prompt": "1+1=", "chosen": "#2", "rejected": "#2"}])
    files = {"data.train": equal, "data.options": {}, "data.dev": "", "data.dev_rows": 0, "data.test": ""}
    with pytest.raises(DataError, match="chosen and rejected of row 0 are equal"):
        opened(offline_config("dpo", tmp_path / "a", **files))
    missing = write_rows(tmp_path / "missing.jsonl", [{"prompt": "1+1=", "chosen": "#2"}])
    with pytest.raises(DataError, match="row 0 has no 'rejected'"):
        opened(offline_config("dpo", tmp_path / "a", **{**files, "data.train": missing}))
    with pytest.raises(ConfigError, match="center_on sets a reward model's bias, and this stage trains none"):
        make_config(offline_config("dpo", tmp_path / "a", **{"critic.center_on": "chosen"}))
    with pytest.raises(ConfigError, match="splits_by_prompt takes dev and test from"):
        make_config(offline_config("dpo", tmp_path / "a", **{"data.splits_by_prompt": True}))
    with pytest.raises(ConfigError, match="hinge reads no label_smoothing"):
        make_config(offline_config("dpo", tmp_path / "a", **{"algo.loss": "hinge", "algo.label_smoothing": 0.1}))


def test_a_language_model_is_no_reward_model_to_start_from(tmp_path: Path) -> None:
    session = open_session(make_config(offline_config("reward_model", tmp_path / "run")), jax.devices()[:1])
    save_hf(tmp_path / "lm", session.model, init_params(session.model, layout(), seed=0))
    with pytest.raises(ModelFolderError, match="is no reward model"):
        opened(offline_config("reward_model", tmp_path / "run", **{"critic.init_from": str(tmp_path / "lm")}))
