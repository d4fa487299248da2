"""One stage of a recipe, built: its data, compiled programs, trained and frozen models."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rljax.algos.base import Algorithm
from rljax.config import StageConfig
from rljax.data.batches import SupervisedSource
from rljax.forward import Forward, make_reward, make_score, make_teacher, make_value
from rljax.models.decoder import Model, Params
from rljax.models.params import param_shardings
from rljax.optim import make_optimizer, make_schedule
from rljax.reference import CachedLogprobs, moved_mean
from rljax.rewards.runner import RewardRunner
from rljax.sampler import Generate, make_generate
from rljax.session import Session
from rljax.sharding import in_host_memory, to_global
from rljax.stage_models import frozen_models, optims, trained_models
from rljax.steps import TrainState, UpdatePlan, copy_params, init_state, make_divergence, make_update


class Snapshot(NamedTuple):
    """A policy that samples after it was trained on."""

    step: Any  # optimizer steps it had seen
    policy: Params


@dataclass
class Stage:
    """Built once by ``build_stage``; a step of it reads it."""

    session: Session
    config: StageConfig
    number: int
    algorithm: Algorithm
    optimizer: optax.GradientTransformation
    forwards: dict[str, Forward]  # by trained tree and by frozen model
    source: Any  # PromptSource or a source of rows
    runner: RewardRunner | None
    generate: Generate | None  # None where nothing is sampled, as are source's prompts and runner
    divergence: Callable
    rival: Generate | None = None  # of the policy mixed with the reference, for the second half of a prompt's samples
    text: SupervisedSource | None = None  # mixed into every optimizer step
    frozen: dict[str, Params] = field(default_factory=dict)
    critic_mean: Params | None = None  # running mean of the critic's weights, where the algorithm has one
    past: list["Snapshot"] = field(default_factory=list)  # the policies that rollouts lag behind for, oldest first
    cached_logprobs: dict[str, CachedLogprobs] = field(default_factory=dict)  # the reference's, by split
    last_head_from: int = 1
    _programs: dict[Any, Any] = field(default_factory=dict)

    @property
    def online(self) -> bool:
        return self.algorithm.targets is not None

    @property
    def rows_per_step(self) -> int:
        return self.config.rows_per_step

    @property
    def optimizer_steps(self) -> int:
        """Over the whole stage: the horizon of its schedule."""
        return self.config.optimizer_steps

    def learning_rates(self, step: int) -> dict[str, float]:
        """Of every trained tree at an optimizer step."""
        horizon = max(self.optimizer_steps, 1)
        rates = {}
        for tree, optim in optims(self.config, self.algorithm).items():
            schedule = make_schedule(optim, max(horizon - optim.freeze_steps, 1))
            # Asked in every step, so that what it compiles is compiled at once.
            rate = float(schedule(max(step - optim.freeze_steps, 0)))
            rates[tree] = rate if step >= optim.freeze_steps else 0.0
        return rates

    # -- trained trees

    @property
    def trees(self) -> dict[str, Model]:
        return {tree: self.forwards[tree].model for tree in self.algorithm.trains}

    def shardings(self) -> dict[str, Any]:
        return {tree: param_shardings(model, self.session.train) for tree, model in self.trees.items()}

    def moment_shardings(self) -> dict[str, Any]:
        """Where the optimizer keeps what it knows of each parameter."""
        places = self.shardings()
        return in_host_memory(places) if self.config.offload_optimizer else places

    def start(self, params: dict[str, Params]) -> TrainState:
        """A state at optimizer step 0 that takes over ``params``, by tree: they are donated later on."""
        if self.online and self.config.rollout.lag:
            self.past = [self._snapshot(params["policy"], 0)] * self.config.rollout.lag
        if self.algorithm.critic_ema:
            self.critic_mean = copy_params(params["critic"], self.shardings()["critic"], self.session.param_dtype)
        return init_state(params, self.moment_shardings(), self.optimizer, self.algorithm.init(), self.session.train)

    # -- policies that sample

    def sampler(self, state: TrainState) -> tuple[Params, int]:
        """The policy that samples now, and the optimizer step that it is of.

        It is the one that is trained, an earlier one (``rollout.lag``), or the frozen one of a stage that only samples.
        """
        if self.past:
            return self.past[0].policy, int(self.past[0].step)
        return state.params["policy"] if self.algorithm.trains else self.frozen["policy"], int(state.step)

    def remember(self, state: TrainState) -> None:
        """A copy of the policy before an update that donates it, where a later rollout is its."""
        if self.past:
            self.past = [*self.past[1:], self._snapshot(state.params["policy"], int(state.step))]

    def _snapshot(self, policy: Params, step: int) -> "Snapshot":
        places = param_shardings(self.session.model, self.session.train)
        copy = copy_params(policy, places, self.session.dtype)
        return Snapshot(jax.device_put(jnp.int32(step), self.session.train.replicated), copy)

    # -- frozen models

    @property
    def reference(self) -> Params | None:
        return self.frozen.get("reference")

    def freeze(self, name: str, params: Params) -> None:
        """Keep a copy of ``params`` as the frozen model ``name``, in the compute dtype."""
        shardings = param_shardings(self.forwards[name].model, self.session.train)
        if name == "reference" and self.config.offload_reference:
            shardings = in_host_memory(shardings)
        self.frozen[name] = copy_params(params, shardings, self.frozen_dtype(name))

    def frozen_dtype(self, name: str) -> Any:
        """The compute dtype; that of the master weights for a running mean, whose small moves would round away."""
        moves = name == "reference" and self.config.reference_ema
        return self.session.param_dtype if moves else self.session.dtype

    @property
    def caches_reference(self) -> bool:
        """The reference stays and so do the rows: each is scored once, and the reference is let go."""
        return not self.online and "ref_logprobs" in self.algorithm.needs and not self.moving_reference

    def reference_logprobs(self, rows: Any, split: str = "train") -> Any:
        """The reference's log-probs of rows of comparisons: those kept, or those of the reference as it is now."""
        layout = self.session.train.rows
        if self.caches_reference:
            return to_global(self.cached_logprobs[split].of(rows.row_id, rows.loss_mask), layout)
        host = {"tokens": rows.tokens, "valid": rows.valid, "loss_mask": rows.loss_mask}
        batch = {name: to_global(array, layout) for name, array in host.items()}
        return self.program("score_reference", 1)(self.reference, batch)

    @property
    def moving_reference(self) -> bool:
        """The reference changes while the stage runs, so the checkpoint has to hold it."""
        moves = self.config.reference_reset_steps or self.config.reference_ema
        return "ref_logprobs" in self.algorithm.needs and bool(moves)

    def update_reference(self, state: TrainState, stage_step: int) -> None:
        """Every ``reference_reset_steps`` (0: each step), to the policy or by ``reference_ema`` towards it."""
        if not self.moving_reference or stage_step % (self.config.reference_reset_steps or 1):
            return
        policy, decay = state.params["policy"], self.config.reference_ema
        if decay:
            self.frozen["reference"] = moved_mean(self.reference, policy, decay)
        else:
            self.freeze("reference", policy)

    def update_critic_mean(self, state: TrainState) -> None:
        """Follow the critic, by as many steps as a rollout has."""
        if self.algorithm.critic_ema:
            steps = self.config.batch.epochs * self.config.batch.minibatches
            self.critic_mean = moved_mean(self.critic_mean, state.params["critic"], self.algorithm.critic_ema**steps)

    # -- compiled programs

    def program(self, kind: str, head_from: int, state: TrainState | None = None) -> Callable:
        """The compiled program for rows whose first trained column is ``head_from``; made once.

        Kinds: update, targets; score_<model> of a policy; values of the critic; teacher; reward.
        """
        key = (kind, head_from)
        if key not in self._programs:
            self._programs[key] = self._make_program(kind, head_from, state)
        return self._programs[key]

    def _make_program(self, kind: str, head_from: int, state: TrainState | None) -> Callable:
        batch = self.config.batch
        rows = self.rows_per_step // batch.minibatches
        micro_rows = batch.micro_batch_rows or rows
        scored_rows = self.config.rollout_rows if self.online else self.rows_per_step
        pieces = max(scored_rows // micro_rows, 1)
        bin_length = batch.row_length if batch.pack else None
        if kind.startswith("score_"):
            from_host = kind == "score_reference" and self.config.offload_reference
            forward = self.forwards[kind.removeprefix("score_")]
            return make_score(forward, head_from, pieces, bin_length, from_host=from_host, name=kind)
        if kind == "values":
            return make_value(self.forwards["critic"], pieces, bin_length)
        if kind == "reward":
            return make_reward(self.forwards["reward_model"], pieces, bin_length)
        if kind == "teacher":
            k = min(self.config.teacher_top_k, self.session.model.config.vocab_size)
            return make_teacher(self.forwards["teacher"], head_from, pieces, k, bin_length)
        if kind == "targets":
            assert self.algorithm.targets is not None  # an online stage
            return jax.jit(self.algorithm.targets)
        assert kind == "update", kind
        plan = UpdatePlan(
            epochs=batch.epochs,
            minibatches=batch.minibatches,
            micro_batches=rows // micro_rows,
            head_from=head_from,
            bin_length=bin_length,
            text_coef=self.config.text_mix.coef,
        )
        trained = {tree: self.forwards[tree] for tree in self.algorithm.trains}
        shardings = jax.tree.map(lambda x: x.sharding, state)
        return make_update(self.algorithm, trained, self.optimizer, plan, shardings)


def build_stage(
    session: Session,
    config: StageConfig,
    number: int,
    source: Any,
    runner: RewardRunner | None,
    text: SupervisedSource | None = None,
) -> Stage:
    algorithm = config.algorithm()
    sampling = session.sampling(config) if algorithm.targets is not None else None
    if sampling is not None:
        sampling = replace(sampling, unimix=config.rollout.unimix)  # evaluations sample from the policy itself
    mixture = algorithm.rival_mixture
    writers = 2 if mixture else 1  # each is called with its own share of a prompt's completions
    rows_a_call = config.rollout_rows // config.rollout.pieces // writers
    generate = partial(
        make_generate,
        session.model,
        session.train,
        session.decode,
        dtype=session.dtype,
        refill=session.refill(config, rows_a_call, config.rollout.group_size // writers),
        weights_dtype=config.rollout.weights_dtype,
        cache_dtype=config.rollout.cache_dtype,
    )
    models = frozen_models(session, config, algorithm) | trained_models(session, config, algorithm)
    return Stage(
        session=session,
        config=config,
        number=number,
        algorithm=algorithm,
        optimizer=make_optimizer(
            optims(config, algorithm), max(config.optimizer_steps, 1), clip_scope=config.clip_scope
        ),
        forwards={name: session.forward(sampling, model) for name, model in models.items()},
        source=source,
        runner=runner,
        generate=generate(replace(sampling, greedy_samples=algorithm.greedy_samples)) if sampling else None,
        rival=generate(sampling, mixture=None if mixture == 1 else mixture, name="rival_rollout")
        if sampling and mixture
        else None,
        divergence=make_divergence(session.train),
        text=text,
    )
