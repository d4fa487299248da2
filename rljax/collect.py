"""The completions of one step: one round of prompts, or several with dynamic sampling."""

from typing import Any

import jax
import numpy as np

from rljax.config import RolloutConfig
from rljax.data.batches import DataPosition, PromptBatch, repeat_prompts
from rljax.models.decoder import Params
from rljax.pieces import Times
from rljax.rollout_metrics import row_metrics
from rljax.rollouts import Completions, ModelReward, Rival, complete
from rljax.session import ROLLOUT_KEY
from rljax.sharding import to_global
from rljax.stages import Stage
from rljax.steps import TrainState
from rljax.types import Rollout


def collect(
    stage: Stage, state: TrainState, position: DataPosition, step: int
) -> tuple[Completions, DataPosition, dict[str, float]]:
    """Completions and their metrics of one step, in one round of prompts, or where ``keep_groups`` chooses in several.

    Rounds go on until enough groups are neither all right nor all wrong or ``max_rounds`` is reached. Surplus groups
    count as consumed; missing ones are filled with groups whose rows are masked.
    """
    r = stage.config.rollout
    chooses = r.keep_groups != "all"
    rounds: list[Completions] = []
    kept: list[tuple[int, int]] = []  # (round, group)
    for number in range(r.max_rounds if chooses else 1):
        rows, prompts, position = stage.source.take(position, r.prompts_per_step)
        prompts = repeat_prompts(prompts, r.group_size)
        rows = [row for row in rows for _ in range(r.group_size)]
        if chooses:
            prompts = _widened(prompts, stage.source.prompt_lengths[-1])
        key = stage.session.key(ROLLOUT_KEY, stage.number, step, number)
        assert stage.generate is not None  # an online stage
        policy, version = stage.sampler(state)
        done = complete(
            stage.session,
            stage.generate,
            policy,
            prompts,
            rows,
            stage.runner,
            key,
            version,
            model_reward=model_reward(stage),
            rival=rival(stage, policy),
            pieces=r.pieces,
        )
        if not chooses:
            metrics = row_metrics([done], r.group_size, stage.rival is not None)
            return done, position, metrics | {"train/groups_kept": 1.0}
        rounds.append(done)
        kept += [(number, g) for g in np.flatnonzero(kept_groups(done, r)).tolist()]
        if len(kept) >= r.prompts_per_step:
            break
    drawn = len(rounds) * r.prompts_per_step
    metrics = row_metrics(rounds, r.group_size, stage.rival is not None)
    metrics |= {"train/groups_kept": len(kept) / drawn, "train/rounds": float(len(rounds))}
    return _selected(stage, rounds, kept[: r.prompts_per_step]), position, metrics


def kept_groups(done: Completions, r: RolloutConfig) -> np.ndarray:
    """Which groups teach something [prompts]: by right and wrong, where all of a group is judged, or by reward."""
    correct, rewards = (x.reshape(-1, r.group_size) for x in (done.correct, done.rewards))
    unequal = rewards.min(axis=1) < rewards.max(axis=1)
    if r.keep_groups == "unequal":
        return unequal
    (low, high), share = r.keep_between, correct.mean(axis=1)
    return np.where((correct >= 0).all(axis=1), (low < share) & (share < high), unequal)


def model_reward(stage: Stage) -> ModelReward | None:
    """The stage's frozen reward model; None where it has none."""
    if "reward_model" not in stage.frozen:
        return None

    def scores(rollout: Rollout) -> Any:
        rows = {"tokens": rollout.tokens, "valid": rollout.valid}
        return stage.program("reward", 0)(stage.frozen["reward_model"], rows)

    return ModelReward(scores, stage.config.reward_model_weight, stage.config.reward_model_threshold)


def rival(stage: Stage, policy: Params) -> Rival | None:
    """The policy mixed with the reference, or the reference alone; None where the policy writes everything."""
    if stage.rival is None:
        return None
    alone = stage.algorithm.rival_mixture == 1
    params = stage.reference if alone else (policy, stage.reference)
    return Rival(stage.rival, params, stage.config.rollout.group_size)


def _widened(prompts: PromptBatch, width: int) -> PromptBatch:
    grow = ((0, 0), (width - prompts.tokens.shape[1], 0))
    return prompts._replace(tokens=np.pad(prompts.tokens, grow), valid=np.pad(prompts.valid, grow))


def _selected(stage: Stage, rounds: list[Completions], kept: list[tuple[int, int]]) -> Completions:
    """One step's rows out of several rounds', put on the devices again; groups that are missing have an empty mask."""
    size, wanted = stage.config.rollout.group_size, stage.config.rollout.prompts_per_step
    fill = [(0, g) for g in range(wanted) if (0, g) not in kept][: wanted - len(kept)]
    picks = [(n, g * size + i) for n, g in [*kept, *fill] for i in range(size)]

    def pick(*arrays: Any) -> np.ndarray:
        return np.stack([arrays[n][i] for n, i in picks])

    host: Any = jax.tree.map(pick, *(done.host for done in rounds))
    host.loss_mask[len(kept) * size :] = False
    layout = stage.session.train.rows
    parts = dict.fromkeys(name for done in rounds for name in done.parts)
    where = {pair: k for k, pair in enumerate(picks[: len(kept) * size])}
    mine = [(n, i, where[n, i]) for n, done in enumerate(rounds) for i in done.samples if (n, i) in where]
    return Completions(
        rollout=jax.tree.map(lambda leaf: to_global(leaf, layout), host),
        host=host,
        rows=[rounds[n].rows[i] for n, i in picks],
        rewards=pick(*(done.rewards for done in rounds)),
        correct=pick(*(done.correct for done in rounds)),
        parts={name: pick(*(done.part(name) for done in rounds)) for name in parts},
        dense=pick(*map(_dense, rounds)) if any(done.dense is not None for done in rounds) else None,
        failures=sum(done.failures for done in rounds),
        failed=[record for done in rounds for record in done.failed],
        samples={k: rounds[n].samples[i] for n, i, k in mine},
        answers={k: rounds[n].answers[i] for n, i, k in mine},
        times=Times(*map(sum, zip(*(done.times for done in rounds), strict=True))),
    )


def _dense(done: Completions) -> np.ndarray:
    """A round's rewards of single tokens; zeros where no reward gave any."""
    return np.zeros(done.host.tokens.shape) if done.dense is None else done.dense
