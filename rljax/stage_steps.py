"""One step of a stage: draw rows and train, or sample, reward, score and train."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from rljax.collect import collect
from rljax.data.batches import DataPosition
from rljax.rollouts import Completions, rival_rows
from rljax.session import CONTROL_KEY, SHUFFLE_KEY
from rljax.sharding import to_global
from rljax.stages import Stage
from rljax.steps import TrainState
from rljax.types import Experience


class StepResult(NamedTuple):
    state: TrainState
    position: DataPosition
    metrics: dict[str, float]
    completions: Completions | None


def offline_step(stage: Stage, state: TrainState, position: DataPosition, step: int) -> StepResult:
    """Draw rows, update."""
    start = time.perf_counter()
    layout = stage.session.train.rows
    _, rows, position = stage.source.take(position, stage.rows_per_step // stage.algorithm.unit)
    host = {name: array for name, array in rows._asdict().items() if name != "row_id"}
    batch = {name: to_global(array, layout) for name, array in host.items()}
    if "ref_logprobs" in stage.algorithm.needs:
        batch["ref_logprobs"] = stage.reference_logprobs(rows)
    tokens = int(rows.valid.sum())
    state, metrics = _update(stage, state, batch, 1, step)
    seconds = time.perf_counter() - start
    metrics |= {
        "tokens": tokens,
        "time/update_s": seconds,
        "time/step_s": seconds,
        "speed/tokens_per_s": tokens / seconds,
    }
    return StepResult(state, position, metrics, None)


def collect_step(stage: Stage, state: TrainState, position: DataPosition, step: int) -> StepResult:
    """Sample and reward; nothing is trained."""
    start = time.perf_counter()
    done, position, metrics = collect(stage, state, position, step)
    seconds, tokens = time.perf_counter() - start, int(done.host.valid.sum())
    stage.last_head_from = done.host.tokens.shape[1] - stage.config.rollout.max_new_tokens
    metrics |= {
        "tokens": tokens,
        "train/skipped": 0.0,
        **_sampling_times(done),
        "time/step_s": seconds,
        "speed/tokens_per_s": tokens / seconds,
    }
    return StepResult(state, position, metrics, done)


def online_step(stage: Stage, state: TrainState, position: DataPosition, step: int) -> StepResult:
    """Sample, reward, score, update: one rollout."""
    start = time.perf_counter()
    done, position, metrics = collect(stage, state, position, step)
    head_from = done.host.tokens.shape[1] - stage.config.rollout.max_new_tokens

    middle = time.perf_counter()
    experience, score_metrics = score(stage, state, done, head_from, step)
    algo_state, batch = stage.program("targets", head_from)(state.algo_state, experience)
    scored = time.perf_counter()
    metrics["rollout/staleness"] = float(int(state.step) - int(done.host.step_version.max()))
    stage.remember(state)
    state, update_metrics = _update(stage, state._replace(algo_state=algo_state), batch, head_from, step)
    stage.update_critic_mean(state)
    end = time.perf_counter()
    tokens = int(done.host.valid.sum())
    stage.last_head_from = head_from
    metrics |= score_metrics | update_metrics
    metrics |= {
        "tokens": tokens,
        **_sampling_times(done),
        "time/score_s": scored - middle,
        "time/update_s": end - scored,
        "time/step_s": end - start,
        "speed/tokens_per_s": tokens / (end - start),
    }
    return StepResult(state, position, metrics, done)


def _sampling_times(done: Completions) -> dict[str, float]:
    return {
        **{f"time/{name}_s": seconds for name, seconds in done.times._asdict().items()},
        "speed/rollout_tokens_per_s": float(done.lengths.sum()) / done.times.rollout,
    }


def score(
    stage: Stage, state: TrainState, done: Completions, head_from: int, step: int
) -> tuple[Experience, dict[str, float]]:
    """Everything that the algorithm needs of a rollout, each computed once."""
    session, needs, r = stage.session, stage.algorithm.needs, done.rollout
    layout, rewards = session.train.rows, done.rewards
    if stage.config.reward.permute:
        rewards = np.random.default_rng([session.config.seed, CONTROL_KEY, step]).permutation(rewards)
    experience = Experience(
        rollout=r,
        rewards=to_global(rewards.astype(session.param_dtype), layout),
        correct=to_global(done.correct == 1, layout),
    )
    metrics: dict[str, float] = {}
    rows = {"tokens": r.tokens, "valid": r.valid}  # no support: a frozen model's distribution is whole
    if stage.reference is not None:
        ref_logprobs = stage.program("score_reference", head_from)(stage.reference, rows)
        experience = experience._replace(ref_logprobs=ref_logprobs)
        gaps = jax.device_get(stage.divergence(r.behavior_logprobs, ref_logprobs, _of_policy(stage, done)))
        metrics |= {f"train/{name}": float(value) for name, value in gaps.items()}
    if "guide_logprobs" in needs:
        guide = stage.program("score_guide", head_from)(stage.frozen["guide"], rows)
        experience = experience._replace(guide_logprobs=guide)
    if "teacher_topk" in needs:
        tokens, logprobs = stage.program("teacher", head_from)(stage.frozen["teacher"], rows)
        experience = experience._replace(teacher_tokens=tokens, teacher_logprobs=logprobs)
    if "proximal_logprobs" in needs:
        on_support = {**rows, "support": r.support}
        proximal = stage.program("score_policy", head_from)(state.params["policy"], on_support)
        experience = experience._replace(proximal_logprobs=proximal)
    if "values" in needs:
        values, final = stage.program("values", head_from)(state.params["critic"], rows)
        experience = experience._replace(values=values, final_values=final)
    if stage.critic_mean is not None:
        ema_values, _ = stage.program("values", head_from)(stage.critic_mean, rows)
        experience = experience._replace(ema_values=ema_values)
    if "dense_rewards" in needs:
        dense = np.zeros(r.tokens.shape) if done.dense is None else done.dense
        experience = experience._replace(dense_rewards=to_global(dense.astype(session.param_dtype), layout))
    return experience, metrics


def _of_policy(stage: Stage, done: Completions) -> jax.Array:
    """The loss mask of the completions that the policy wrote: all, or what a rival left to it."""
    if stage.rival is None:
        return done.rollout.loss_mask
    theirs = rival_rows(len(done.rows), stage.config.rollout.group_size)
    return to_global(done.host.loss_mask & ~theirs[:, None], stage.session.train.rows)


def _update(
    stage: Stage, state: TrainState, batch: Any, head_from: int, step: int
) -> tuple[TrainState, dict[str, float]]:
    before = int(state.step)
    key = stage.session.key(SHUFFLE_KEY, stage.number, step)
    update = stage.program("update", head_from, state)
    state, arrays = update(state, batch, key, _text_rows(stage, step)) if stage.text else update(state, batch, key)
    values = {name: np.asarray(value, np.float64) for name, value in jax.device_get(arrays).items()}
    metrics = {f"train/{name}": float(v.max() if name == "max_log_ratio" else v.mean()) for name, v in values.items()}
    metrics["train/skipped"] = float(values["skipped"].sum())
    if "max_log_ratio" in values:
        metrics["train/first_max_log_ratio"] = float(values["max_log_ratio"][0])
        metrics["train/logprob_gap"] = float(values["logprob_gap"][0])
    if "advantage_square" in values:
        square = metrics.pop("train/advantage_square") - metrics["train/advantage_mean"] ** 2
        metrics["train/advantage_std_raw"] = max(square, 0.0) ** 0.5
    rates = stage.learning_rates(before)
    metrics["train/learning_rate"] = rates[stage.algorithm.trains[0]]
    if len(rates) > 1:
        metrics |= {f"train/learning_rate/{tree}": rate for tree, rate in rates.items()}
    metrics["train/optimizer_steps"] = float(int(state.step))
    return state, metrics


def _text_rows(stage: Stage, step: int) -> Any:
    """The text of a step's optimizer steps; where it stands in its data follows from the number of the step."""
    assert stage.text is not None
    batch = stage.config.batch
    count = stage.config.text_mix.rows * batch.epochs * batch.minibatches
    position = DataPosition(*divmod(step * count, len(stage.text)))
    _, rows, _ = stage.text.take(position, count)
    host = {"tokens": rows.tokens, "valid": rows.valid, "loss_mask": rows.loss_mask}
    return {name: to_global(array, stage.session.train.rows) for name, array in host.items()}
