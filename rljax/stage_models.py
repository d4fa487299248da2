"""Which models a stage trains and which it keeps frozen, and where each comes from."""

from typing import Any

from rljax.algos.base import Algorithm
from rljax.config import StageConfig
from rljax.models.decoder import Model
from rljax.session import Session

# Frozen policies: what an algorithm needs of each.
FROZEN_NEEDS = {"reference": "ref_logprobs", "guide": "guide_logprobs", "teacher": "teacher_topk"}


def trained_models(session: Session, config: StageConfig, algorithm: Algorithm) -> dict[str, Model]:
    scalar = session.scalar_model(config.critic.init_from)._replace(scores=algorithm.critic_outputs)
    return {tree: session.model if tree == "policy" else scalar for tree in algorithm.trains}


def frozen_sources(config: StageConfig, algorithm: Algorithm) -> dict[str, str]:
    """Where each frozen model of a stage comes from; "start" is what the stage starts from."""
    named = {"reference": config.reference_from, "guide": config.guide_from, "teacher": config.teacher_from}
    sources = {name: source for name, source in named.items() if FROZEN_NEEDS[name] in algorithm.needs}
    sources |= {} if algorithm.trains else {"policy": "start"}
    scores = config.reward_model_from and algorithm.targets is not None
    return sources | ({"reward_model": config.reward_model_from} if scores else {})


def frozen_models(session: Session, config: StageConfig, algorithm: Algorithm) -> dict[str, Model]:
    models = {}
    for name, source in frozen_sources(config, algorithm).items():
        make = session.scalar_model if name == "reward_model" else session.model_from
        models[name] = make("" if source == "start" else source)
    return models


def optims(config: StageConfig, algorithm: Algorithm) -> dict[str, Any]:
    """Each trained tree's optimizer: a critic beside a policy has its own."""
    beside = len(algorithm.trains) > 1
    return {tree: config.critic.optim if tree == "critic" and beside else config.optim for tree in algorithm.trains}
