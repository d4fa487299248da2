"""What RL did to a text: nothing, where the policy is the start; and the bounds of a reward that counts, by hand."""

import json

import pytest

from rljax.config import make_config
from rljax.drift import BOUNDS, main
from rljax.models.hf_export import save_hf
from rljax.session import open_session
from rljax.setup import split_rows
from tests.tiny import ROOT, tiny_config

CONFIG = ["--config", str(ROOT / "tests" / "configs" / "tiny.py"), "--config.compilation_cache=off"]
START = {"nll": 3.0, "distinct_4": 0.9, "length": 150.0, "best_of": {"4": 0.5}}
KEPT = {"kl_per_completion": 8.0, "nll": 3.25, "distinct_4": 0.73, "length": 121.0, "reward": 0.5}


def test_the_start_has_not_drifted_from_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rljax.drift.start_devices", lambda config: None)
    session = open_session(make_config(tiny_config()))
    folder = tmp_path / "model"
    save_hf(folder, session.model, session.base_params(), session.tokenizer.hf)
    scalar, judge = session.scalar_model("policy"), tmp_path / "judge"
    save_hf(judge, scalar, session.with_scalar_head(session.base_params(), scalar, 0), session.tokenizer.hf)
    assert main([*CONFIG, f"--model={folder}", f"--config.reward_model_from={judge}"]) == 0
    report = json.loads(capsys.readouterr().out)
    base, policy = report["base"], report[str(folder)]
    assert (report["prompts"], report["samples"]) == (8, 16)
    assert abs(policy["kl_per_completion"]) < 1e-4
    for key in ("reward", "nll", "distinct_4", "length", "finished", "shown", "parts"):
        assert policy[key] == base[key]
    assert policy["reward"] == pytest.approx(policy["parts"]["tests.tiny:even_share"] + policy["parts"]["model"])
    for name in ("win_rate", "win_rate_model"):
        assert policy[name] == 0.5 and policy[f"{name}_low"] <= 0.5 <= policy[f"{name}_high"]
    best = [base["best_of"][n] for n in ("1", "2", "4", "8", "16")]
    assert best[0] == pytest.approx(base["reward"]) and best == sorted(best)
    holds = dict.fromkeys(BOUNDS, True) | {"reward": False}
    assert policy["holds"] == holds


@pytest.mark.parametrize(("argument", "split"), [([], "test"), (["--split=dev"], "dev")])
def test_prompts_are_those_of_the_split_that_is_named(argument, split, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("rljax.drift.start_devices", lambda config: None)
    monkeypatch.setattr("rljax.drift.find_params", lambda folder, model: None)
    monkeypatch.setattr("rljax.drift.split_rows", lambda data, name: asked.append(name) or split_rows(data, name))
    monkeypatch.setattr("rljax.drift.measure_drift", lambda *_: {})
    assert main([*CONFIG, "--model=x", *argument]) == 0
    assert main([*CONFIG, "--model=x", "--split=train"]) == 2
    assert asked == [split] and "held-out prompts are those of dev or of test" in capsys.readouterr().err


@pytest.mark.parametrize("key", BOUNDS)
def test_each_bound_by_hand(key):
    """KL 8, nll 3.0 + 0.3, 80 to 120 % of 0.9 and of 150, best-of-4 0.5."""
    assert all(holds(START, KEPT) for holds in BOUNDS.values())
    worse = {"kl_per_completion": 8.1, "nll": 3.31, "distinct_4": 0.71, "length": 181.0, "reward": 0.49}
    assert [name for name, holds in BOUNDS.items() if not holds(START, {**KEPT, key: worse[key]})] == [key]


def test_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rljax.drift.start_devices", lambda config: None)
    assert main(["--help"]) == 0 and "--model=A --model=B" in capsys.readouterr().out
    assert main(CONFIG) == 2
    assert capsys.readouterr().err == "error: give the trained policy's folder as --model=runs/NAME/model\n"
    assert main([*CONFIG, f"--model={tmp_path / 'nowhere'}"]) == 2
    assert capsys.readouterr().err == f"error: model folder {tmp_path / 'nowhere'} does not exist\n"
    monkeypatch.setattr("rljax.drift.find_params", lambda folder, model: None)
    assert main([*CONFIG, "--model=x", "--config.reward_model_from=main"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: config.reward_model_from is the stage 'main'; name the folder that it was exported to"
    )
