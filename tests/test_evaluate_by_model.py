"""A run whose only judge is a reward model: its held-out score is that model's, before and after training."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rljax.config import make_config
from rljax.forward import make_reward
from rljax.rollouts import ModelReward
from rljax.run import Run, finish, open_training
from rljax.session import open_session
from rljax.trainer import train
from tests.configs import tiny
from tests.tiny import lines

REWARD_MODEL = {
    "algo": {"name": "reward_model", "loss": "bradley_terry"},
    "steps": 2,
    "data": {"train": "arithmetic_comparisons"},
    "batch": {"rows": 8, "minibatches": 1},
    "critic": {"init_from": "policy"},
}


def test_the_score_is_the_reward_model_s(tmp_path: Path) -> None:
    config = tiny.get_config()
    config.unlock()
    config.reward = ConfigDict({"names": ()})
    config.stages = ConfigDict({"reward_model": REWARD_MODEL})
    config.recipe, config.reward_model_from, config.init_from = ("reward_model", "main"), "reward_model", "base"
    config.steps, config.output_dir, config.mesh = 2, str(tmp_path), "1,1,1"
    config.eval.every_steps = 0
    session = open_session(make_config(config), jax.devices()[:1])
    with open_training(session) as run:
        train(run)
        finish(run)
        batches = run.evaluators["test"].run(run.load_policy("main"), 4, judge(run))[1]
    found = [record for record in lines(tmp_path) if "eval/score" in record]
    assert [record["step"] for record in found] == [2, 4]
    rewards = np.concatenate([done.rewards[done.host.valid.any(axis=1)] for done in batches])
    assert found[-1]["eval/n"] == len(rewards) == 8
    assert found[-1]["eval/score"] == pytest.approx(rewards.mean(), rel=1e-5)
    assert found[0]["eval/score"] != found[1]["eval/score"] != 0
    assert_one_opening(config, tmp_path)


def assert_one_opening(config: ConfigDict, folder: Path) -> None:
    """Cut before the main stage's first checkpoint, the run does not measure its start again."""
    shutil.rmtree(folder / "checkpoints" / "4")
    with open_training(open_session(make_config(config), jax.devices()[:1])) as run:
        assert run.progress.step == 2
        train(run)
    for key in ("eval/score", "dev/score"):
        assert [record["step"] for record in lines(folder) if key in record] == [2, 4]


def judge(run: Run) -> ModelReward:
    """The reward model that the first stage left."""
    model = run.session.scalar_model("reward_model")
    params, reward = run.load_scalar("reward_model", model), make_reward(run.session.forward(None, model), 1)
    return ModelReward(lambda rollout: reward(params, {"tokens": rollout.tokens, "valid": rollout.valid}), 1.0)
