"""One stage of a recipe, built: its data, its compiled programs, its frozen models, and one step of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rljax.algos.base import Algorithm
from rljax.config import StageConfig
from rljax.data.batches import DataPosition, PromptBatch, PromptSource, SupervisedSource, repeat_prompts
from rljax.models.decoder import Params
from rljax.models.params import param_shardings
from rljax.optim import make_optimizer, make_schedule, state_shardings
from rljax.rewards.runner import RewardRunner
from rljax.rollouts import Completions, complete, row_metrics
from rljax.sampler import Generate, make_generate
from rljax.session import CONTROL_KEY, ROLLOUT_KEY, SHUFFLE_KEY, Session
from rljax.sharding import to_global
from rljax.steps import (
    Forward,
    TrainState,
    UpdatePlan,
    copy_params,
    init_state,
    make_divergence,
    make_score,
    make_update,
)
from rljax.types import Experience, Rollout


class StepResult(NamedTuple):
    state: TrainState
    position: DataPosition
    metrics: dict[str, float]
    completions: Completions | None


@dataclass
class Stage:
    """Built once by ``build_stage``; ``online_step`` and ``offline_step`` read it."""

    session: Session
    config: StageConfig
    number: int
    algorithm: Algorithm
    optimizer: optax.GradientTransformation
    forward: Forward
    source: Any  # PromptSource or SupervisedSource
    runner: RewardRunner | None
    generate: Generate | None  # None where nothing is sampled, as are source's prompts and runner
    divergence: Callable
    reference: Params | None = None
    last_head_from: int = 1
    _programs: dict[Any, Any] = field(default_factory=dict)

    @property
    def online(self) -> bool:
        return self.algorithm.targets is not None

    @property
    def rows_per_step(self) -> int:
        r = self.config.rollout
        return self.config.batch.rows or r.prompts_per_step * r.group_size

    @property
    def optimizer_steps(self) -> int:
        """Over the whole stage: the horizon of its schedule."""
        return self.config.steps * self.config.batch.epochs * self.config.batch.minibatches

    def learning_rate(self, step: int) -> float:
        return float(make_schedule(self.config.optim, max(self.optimizer_steps, 1))(step))

    def start(self, params: Params) -> TrainState:
        """A state at optimizer step 0 that takes over ``params``: they are donated later on."""
        shardings = {"policy": param_shardings(self.session.model, self.session.train)}
        return init_state({"policy": params}, shardings, self.optimizer, self.algorithm.init(), self.session.train)

    def freeze_reference(self, params: Params) -> None:
        """Keep a copy of ``params`` as the reference."""
        shardings = param_shardings(self.session.model, self.session.train)
        self.reference = copy_params(params, shardings, self.reference_dtype)

    @property
    def reference_dtype(self) -> Any:
        """The compute dtype; that of the master weights for a running mean, whose small moves would round away."""
        return self.session.param_dtype if self.config.reference_ema else self.session.dtype

    @property
    def moving_reference(self) -> bool:
        """The reference changes while the stage runs, so the checkpoint has to hold it."""
        return self.reference is not None and bool(self.config.reference_reset_steps or self.config.reference_ema)

    def update_reference(self, state: TrainState, stage_step: int) -> None:
        """Follow the policy: a running mean (``reference_ema``, its decay), or a fresh copy every so many steps."""
        if not self.moving_reference:
            return
        policy, every = state.params["policy"], self.config.reference_reset_steps
        if self.config.reference_ema:
            self.reference = _moved(self.reference, policy, self.config.reference_ema)
        if every and stage_step % every == 0:
            self.freeze_reference(policy)

    def saved(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint holds of this stage."""
        return {"train": state, **({"reference": self.reference} if self.moving_reference else {})}

    def restored(self, saved: dict[str, Any]) -> TrainState:
        self.reference = saved.get("reference", self.reference)
        return saved["train"]

    def abstract_saved(self) -> dict[str, Any]:
        """The shapes and places of ``saved``, for restoring without making a state first."""
        session = self.session
        params = {"policy": session.abstract_policy()}
        opt_state = jax.eval_shape(self.optimizer.init, params)
        shardings = {"policy": param_shardings(session.model, session.train)}
        everywhere = session.train.replicated
        placed = jax.tree.map(_placed, opt_state, state_shardings(opt_state, shardings, everywhere))
        step, algo_state = jax.eval_shape(lambda: (jnp.int32(0), self.algorithm.init()))
        small = jax.tree.map(lambda x: _placed(x, everywhere), (step, algo_state))
        saved = {"train": TrainState(small[0], params, placed, small[1])}
        moving = "ref_logprobs" in self.algorithm.needs and (
            self.config.reference_reset_steps or self.config.reference_ema
        )
        return {**saved, "reference": session.abstract_policy(self.reference_dtype)} if moving else saved

    def program(self, kind: str, head_from: int, state: TrainState | None = None) -> Callable:
        """The compiled program for rows whose first trained column is ``head_from``; made once."""
        key = (kind, head_from)
        if key not in self._programs:
            rows = self.rows_per_step // self.config.batch.minibatches
            micro_rows = self.config.batch.micro_batch_rows or rows
            if kind == "score":
                self._programs[key] = make_score(self.forward, head_from, self.rows_per_step // micro_rows)
            elif kind == "targets":
                assert self.algorithm.targets is not None  # an online stage
                self._programs[key] = jax.jit(self.algorithm.targets)
            else:
                plan = UpdatePlan(
                    self.config.batch.epochs, self.config.batch.minibatches, rows // micro_rows, head_from
                )
                shardings = jax.tree.map(lambda x: x.sharding, state)
                self._programs[key] = make_update(self.algorithm, self.forward, self.optimizer, plan, shardings)
        return self._programs[key]


def build_stage(
    session: Session,
    config: StageConfig,
    number: int,
    source: PromptSource | SupervisedSource,
    runner: RewardRunner | None,
) -> Stage:
    algorithm = config.algorithm()
    online = algorithm.targets is not None
    sampling = session.sampling(config) if online else None
    steps = config.steps * config.batch.epochs * config.batch.minibatches
    return Stage(
        session=session,
        config=config,
        number=number,
        algorithm=algorithm,
        optimizer=make_optimizer({"policy": config.optim}, max(steps, 1)),
        forward=session.forward(sampling),
        source=source,
        runner=runner,
        generate=make_generate(session.model, session.train, session.decode, sampling, dtype=session.dtype)
        if sampling
        else None,
        divergence=make_divergence(session.train),
    )


def offline_step(stage: Stage, state: TrainState, position: DataPosition, step: int) -> StepResult:
    """Draw rows, update."""
    start = time.perf_counter()
    layout = stage.session.train.rows
    _, rows, position = stage.source.take(position, stage.rows_per_step)
    host = {"tokens": rows.tokens, "valid": rows.valid, "loss_mask": rows.loss_mask}
    batch = {name: to_global(array, layout) for name, array in host.items()}
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


def online_step(stage: Stage, state: TrainState, position: DataPosition, step: int) -> StepResult:
    """Sample, reward, score, update: one rollout."""
    start = time.perf_counter()
    session = stage.session
    done, position, metrics = collect(stage, state, position, step)
    layout = session.train.rows
    head_from = done.host.tokens.shape[1] - stage.config.rollout.max_new_tokens

    middle = time.perf_counter()
    rewards = done.rewards
    if stage.config.reward.permute:
        rewards = np.random.default_rng([session.config.seed, CONTROL_KEY, step]).permutation(rewards)
    experience = Experience(
        rollout=done.rollout,
        rewards=to_global(rewards.astype(session.param_dtype), layout),
        correct=to_global(done.correct == 1, layout),
    )
    if stage.reference is not None:
        r = done.rollout
        rows = {"tokens": r.tokens, "valid": r.valid}  # no support: the reference's distribution is whole
        ref_logprobs = stage.program("score", head_from)(stage.reference, rows)
        experience = experience._replace(ref_logprobs=ref_logprobs)
        gaps = jax.device_get(stage.divergence(r.behavior_logprobs, ref_logprobs, r.loss_mask))
        metrics |= {f"train/{name}": float(value) for name, value in gaps.items()}
    algo_state, batch = stage.program("targets", head_from)(state.algo_state, experience)
    scored = time.perf_counter()
    state, update_metrics = _update(stage, state._replace(algo_state=algo_state), batch, head_from, step)
    end = time.perf_counter()
    tokens = int(done.host.valid.sum())
    stage.last_head_from = head_from
    metrics |= update_metrics | {
        "tokens": tokens,
        "time/rollout_s": done.rollout_s,
        "time/reward_s": done.reward_s,
        "time/score_s": scored - middle,
        "time/update_s": end - scored,
        "time/step_s": end - start,
        "speed/rollout_tokens_per_s": float(done.lengths.sum()) / done.rollout_s,
        "speed/tokens_per_s": tokens / (end - start),
    }
    return StepResult(state, position, metrics, done)


def _update(
    stage: Stage, state: TrainState, batch: Any, head_from: int, step: int
) -> tuple[TrainState, dict[str, float]]:
    before = int(state.step)
    key = stage.session.key(SHUFFLE_KEY, stage.number, step)
    state, arrays = stage.program("update", head_from, state)(state, batch, key)
    values = {name: np.asarray(value, np.float64) for name, value in jax.device_get(arrays).items()}
    metrics = {f"train/{name}": float(v.max() if name == "max_log_ratio" else v.mean()) for name, v in values.items()}
    metrics["train/skipped"] = float(values["skipped"].sum())
    if "max_log_ratio" in values:
        metrics["train/first_max_log_ratio"] = float(values["max_log_ratio"][0])
        metrics["train/logprob_gap"] = float(values["logprob_gap"][0])
    if "advantage_square" in values:
        square = metrics.pop("train/advantage_square") - metrics["train/advantage_mean"] ** 2
        metrics["train/advantage_std_raw"] = max(square, 0.0) ** 0.5
    metrics["train/learning_rate"] = stage.learning_rate(before)
    metrics["train/optimizer_steps"] = float(int(state.step))
    return state, metrics


def collect(
    stage: Stage, state: TrainState, position: DataPosition, step: int
) -> tuple[Completions, DataPosition, dict[str, float]]:
    """Completions and their metrics of one step, in one round of prompts, or with ``keep_groups`` "mixed" in several.

    Rounds go on until enough groups are neither all right nor all wrong or ``max_rounds`` is reached. Surplus groups
    count as consumed; missing ones are filled with groups whose rows are masked.
    """
    r = stage.config.rollout
    mixed = r.keep_groups == "mixed"
    rounds: list[Completions] = []
    kept: list[tuple[int, int]] = []  # (round, group)
    for number in range(r.max_rounds if mixed else 1):
        rows, prompts, position = stage.source.take(position, r.prompts_per_step)
        prompts = repeat_prompts(prompts, r.group_size)
        rows = [row for row in rows for _ in range(r.group_size)]
        if mixed:
            prompts = _widened(prompts, stage.source.prompt_lengths[-1])
        key = stage.session.key(ROLLOUT_KEY, stage.number, step, number)
        assert stage.generate is not None and stage.runner is not None  # an online stage
        done = complete(
            stage.session, stage.generate, state.params["policy"], prompts, rows, stage.runner, key, int(state.step)
        )
        if not mixed:
            return done, position, row_metrics([done], r.group_size)
        scores = np.where(done.correct >= 0, done.correct, done.rewards).reshape(-1, r.group_size)
        rounds.append(done)
        kept += [(number, g) for g in np.flatnonzero(scores.min(axis=1) < scores.max(axis=1)).tolist()]
        if len(kept) >= r.prompts_per_step:
            break
    drawn = len(rounds) * r.prompts_per_step
    metrics = row_metrics(rounds, r.group_size)
    metrics |= {"train/groups_kept": len(kept) / drawn, "train/rounds": float(len(rounds))}
    return _selected(stage, rounds, kept[: r.prompts_per_step]), position, metrics


def _widened(prompts: PromptBatch, width: int) -> PromptBatch:
    grow = ((0, 0), (width - prompts.tokens.shape[1], 0))
    return prompts._replace(tokens=np.pad(prompts.tokens, grow), valid=np.pad(prompts.valid, grow))


def _selected(stage: Stage, rounds: list[Completions], kept: list[tuple[int, int]]) -> Completions:
    """One step's rows out of several rounds', put on the devices again; groups that are missing have an empty mask."""
    size, wanted = stage.config.rollout.group_size, stage.config.rollout.prompts_per_step
    fill = [(0, g) for g in range(wanted) if (0, g) not in kept][: wanted - len(kept)]
    picks = [(n, g * size + i) for n, g in [*kept, *fill] for i in range(size)]

    def pick(*arrays: np.ndarray) -> np.ndarray:
        return np.stack([arrays[n][i] for n, i in picks])

    columns: Any = [pick(*leaves) for leaves in zip(*(done.host for done in rounds), strict=True)]
    host: Any = Rollout(*columns)
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
        failures=sum(done.failures for done in rounds),
        samples={k: rounds[n].samples[i] for n, i, k in mine},
        answers={k: rounds[n].answers[i] for n, i, k in mine},
        rollout_s=sum(done.rollout_s for done in rounds),
        reward_s=sum(done.reward_s for done in rounds),
    )


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@partial(jax.jit, donate_argnums=0, static_argnums=2)
def _moved(reference: Params, policy: Params, decay: float) -> Params:
    return jax.tree.map(lambda r, p: decay * r + (1 - decay) * p, reference, policy)
