"""Held-out text: what is said of it by hand, and in whole runs against the logits of their models."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rljax.config import default_config, make_config
from rljax.data.batches import DataPosition
from rljax.data.rows import DataError
from rljax.evaluate_text import text_metrics
from rljax.models.decoder import Model, Params
from rljax.models.hf import load_config, load_params
from rljax.rewards.estimates import ratio_with_interval
from rljax.run import finish, open_training
from rljax.session import open_session
from rljax.setup import make_comparisons
from rljax.trainer import train
from tests.configs import tiny
from tests.models.tiny import layout, row_logits
from tests.tiny import lines, tiny_config

DEV_ROWS, TEST_ROWS, ROWS_PER_CALL = 6, 9, 4  # neither is a multiple: the last call is filled up
UNTRAINED = {"steps": 0, "checkpoint.export": False}  # measured once, as it starts


def text_config(folder: Path, algo: str = "sft", **overrides: Any) -> ConfigDict:
    """The tiny model on worked sums, without a reward."""
    base, config = tiny.get_config(), default_config(algo)
    with config.unlocked():
        config.update({name: base[name] for name in ("tokenizer", "model", "data")})
    settings = {
        **{"output_dir": str(folder), "mesh": "1,1,1", "steps": 2, "eval.every_steps": 1, "optim.learning_rate": 1e-2},
        **{"data.dev_rows": DEV_ROWS, "data.test_rows": TEST_ROWS},
    }
    config.update_from_flattened_dict({**settings, **overrides})
    return config


def sft_config(folder: Path, **overrides: Any) -> ConfigDict:
    return text_config(folder, **{"batch.rows": ROWS_PER_CALL, "batch.micro_batch_rows": 2, **overrides})


def trained(config: ConfigDict, devices: int = 1) -> list[dict[str, Any]]:
    with open_training(open_session(make_config(config), jax.devices()[:devices])) as run:
        train(run)
        finish(run)
    return lines(Path(config.output_dir))


def evaluated(records: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    return [record for record in records if f"{split}/score" in record]


def sums_by_hand(config: ConfigDict, split: str, model: Model, params: Params) -> tuple[np.ndarray, np.ndarray]:
    """Every row's log-prob and its count of trained tokens, from whole logits in float64."""
    source = make_comparisons(open_session(make_config(config), jax.devices()[:1]))[split]
    _, rows, _ = source.take(DataPosition(), len(source))
    logits = row_logits(model, layout(), params, rows.tokens, rows.valid).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(logprobs[:, :-1], rows.tokens[:, 1:, None], axis=2)[..., 0]
    mask = rows.loss_mask[:, 1:]
    return np.where(mask, chosen, 0).sum(axis=1), mask.sum(axis=1)


@pytest.mark.fast
def test_tokens_weigh_alike_whatever_their_row() -> None:
    """Rows of 2, 1 and 0 trained tokens: -(3 + 3) / 3 and not the mean of -1.5 and -3."""
    found = text_metrics(np.array([-3.0, -3.0, 0.0]), np.array([2, 1, 0]))
    assert (found["n"], found["tokens"], found["score"], found["nll"]) == (2, 3, -2.0, 2.0)
    np.testing.assert_allclose(found["perplexity"], np.exp(2))
    # Draws of two rows: both the first (a quarter of the draws), one of each, both the second.
    assert (found["score_low"], found["score_high"]) == (-3.0, -1.5)
    assert (found["nll_low"], found["nll_high"]) == (1.5, 3.0)
    np.testing.assert_allclose([found["perplexity_low"], found["perplexity_high"]], np.exp([1.5, 3]))
    assert text_metrics(np.zeros(2), np.zeros(2, int)) == {}


@pytest.mark.fast
def test_the_interval_of_a_ratio_covers_its_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits, rounds = 0, 300
    for _ in range(rounds):
        counts = rng.integers(1, 9, 60)
        sums = counts * 2.0 + rng.normal(size=60) * counts
        found = ratio_with_interval("x", sums, counts, resamples=200)
        hits += found["x_low"] <= 2.0 <= found["x_high"]
    assert 0.88 < hits / rounds < 0.99
    with pytest.raises(ValueError, match="a count above 0"):
        ratio_with_interval("x", [1.0], [0])


def test_a_supervised_run_is_measured_on_its_held_out_text(tmp_path: Path) -> None:
    """Before and after training, in calls of four rows, the last of which lacks some, against whole logits."""
    config = sft_config(tmp_path)
    records = trained(config)
    session = open_session(make_config(config), jax.devices()[:1])
    trained_model = load_config(tmp_path / "model")
    models = [
        (session.model, session.base_params()),
        (trained_model, load_params(tmp_path / "model", trained_model, layout())),
    ]
    for split, rows in (("dev", DEV_ROWS), ("eval", TEST_ROWS)):
        found = evaluated(records, split)
        assert [record["step"] for record in found] == ([0, 1, 2] if split == "dev" else [0, 2])
        for record, (model, params) in zip((found[0], found[-1]), models, strict=True):
            sums, counts = sums_by_hand(config, {"eval": "test"}.get(split, split), model, params)
            score = sums.sum() / counts.sum()
            assert (record[f"{split}/n"], record[f"{split}/tokens"]) == (rows, counts.sum())
            np.testing.assert_allclose(record[f"{split}/score"], score, rtol=1e-5)
            np.testing.assert_allclose(record[f"{split}/nll"], -score, rtol=1e-5)
            np.testing.assert_allclose(record[f"{split}/perplexity"], np.exp(-score), rtol=1e-5)
            assert record[f"{split}/nll_low"] < -score < record[f"{split}/nll_high"]
        assert found[-1][f"{split}/nll"] < found[0][f"{split}/nll"] - 0.1
    best = {record["step"]: record["dev/score"] for record in evaluated(records, "dev")}
    assert max(best, key=best.__getitem__) == 2 and (tmp_path / "checkpoints" / "2").is_dir()


def test_any_mesh_measures_alike(tmp_path: Path) -> None:
    config = sft_config(tmp_path, **UNTRAINED)
    session = open_session(make_config(config), jax.devices()[:1])
    sums, counts = sums_by_hand(config, "test", session.model, session.base_params())
    for mesh in ("1,2,1", "1,1,2"):
        records = trained(sft_config(tmp_path / mesh, **UNTRAINED, mesh=mesh), devices=2)
        found = evaluated(records, "eval")[0]
        assert found["eval/tokens"] == counts.sum()
        np.testing.assert_allclose(found["eval/score"], sums.sum() / counts.sum(), rtol=1e-5)


def test_a_run_with_a_reward_is_measured_by_it_alone(tmp_path: Path) -> None:
    for config in (tiny_config(recipe=("main",)), sft_config(tmp_path, **{"reward.names": ("tests.tiny:even_share",)})):
        assert make_comparisons(open_session(make_config(config), jax.devices()[:1])) == {}


def test_distillation_without_a_reward_is_measured_on_rows_with_a_solution(tmp_path: Path) -> None:
    settings = {"algo.beta": 0.0, "teacher_from": "base", "rollout.max_new_tokens": 4, "rollout.temperature": 0.5}
    settings |= {"rollout.prompts_per_step": 4, "rollout.group_size": 2, **UNTRAINED}
    config = text_config(tmp_path, "distillation", **settings)
    found = evaluated(trained(config), "eval")[0]
    session = open_session(make_config(config), jax.devices()[:1])
    sums, counts = sums_by_hand(config, "test", session.model, session.base_params())
    np.testing.assert_allclose(found["eval/score"], sums.sum() / counts.sum(), rtol=1e-5)  # at temperature 1


def test_held_out_rows_without_what_is_measured_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "1+1="}\n' * 4)
    config = sft_config(tmp_path / "run", **{"data.test": str(file), "data.options": {}})
    config.data.train, config.data.dev = str(tmp_path / "train.jsonl"), ""
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "solution": "2"}\n' * 20)
    with pytest.raises(DataError, match="row 0 has neither 'prompt' with 'solution'"):
        open_training(open_session(make_config(config), jax.devices()[:1]))
