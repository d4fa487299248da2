"""One run: its progress, its open resources, and how it is opened and finished."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from rljax.checkpoint import Checkpointer, Preemption
from rljax.compiles import CompileCounter
from rljax.config import Config, identity_keys, resolved
from rljax.data.batches import SupervisedSource
from rljax.data_report import report_data
from rljax.evaluate import Evaluator, report_failures, show
from rljax.evaluate_preferences import BestOfN, PreferenceEvaluator
from rljax.evaluate_text import TextEvaluator
from rljax.metrics import MetricsWriter
from rljax.models.decoder import Model, Params
from rljax.models.hf_export import save_hf
from rljax.models.hf_import import find_params, load_params
from rljax.progress import Progress
from rljax.rewards.runner import RewardRunner
from rljax.rollouts import ModelReward
from rljax.runs import check_space, is_remote, open_run, versions
from rljax.session import Session
from rljax.setup import make_writer, open_inputs
from rljax.sharding import agree
from rljax.stage_models import frozen_sources
from rljax.stage_state import abstract_saved
from rljax.stages import build_stage


@dataclass
class Run:
    """The open things of one run; a context manager that closes them."""

    session: Session
    runner: RewardRunner | None
    writer: MetricsWriter
    checkpoints: Checkpointer
    preemption: Preemption
    compiles: CompileCounter
    sources: list[Any]  # by stage; None until an earlier stage has sampled its rows
    texts: list[SupervisedSource | None]  # by stage, mixed into its steps
    evaluators: dict[str, Evaluator]
    comparisons: dict[str, Any]  # held-out rows of the main stage, by split
    progress: Progress
    open_things: ExitStack
    trees: dict[str, Params] | None = None  # what the last stage trained, when it is done
    traces: bool = False  # a profile is being taken
    # Of comparisons, once the main stage is open.
    preference_evaluators: dict[str, PreferenceEvaluator | TextEvaluator] = field(default_factory=dict)
    best_of_n: dict[str, BestOfN] = field(default_factory=dict)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and jax.process_count() > 1:
            error.add_note(
                "If another process died first, its log says why. Started again, all go on from what is saved."
            )
            return  # closing would wait for peers, who wait for this process in a collective
        self.open_things.close()

    @property
    def config(self) -> Config:
        return self.session.config

    # -- weights that stages hand to each other

    def _stage_weights(self, name: str, tree: str) -> Checkpointer:
        return Checkpointer(self.session.folder / "stages" / name / tree, keep=1, keep_best=0)

    def save_stage(self, name: str, trees: dict[str, Params]) -> None:
        for tree, params in trees.items():
            with self._stage_weights(name, tree) as store:
                store.delete_after(self.progress.stage_step - 1)  # of a run that was killed before its checkpoint
                store.save(self.progress.stage_step, params, {}, force=True)  # a stage may be prolonged later
                store.wait()

    def load_policy(self, source: str, model: Model | None = None) -> Params:
        """A policy in master precision: base, what a stage trained, or a folder's."""
        session = self.session
        if source == "base":
            return session.base_params()
        if source in self.config.recipe:
            return self._load_tree(source, "policy", session.model)
        return load_params(source, model or session.model_from(source), session.train, dtype=session.param_dtype)

    def load_scalar(self, source: str, model: Model) -> Params:
        """A reward model or critic, head included: what a stage trained, or a folder's."""
        if source not in self.config.recipe:
            return load_params(source, model, self.session.train, dtype=self.session.param_dtype)
        trained = self.config.stage(source).algorithm().trains
        return self._load_tree(source, next(tree for tree in trained if tree != "policy"), model)

    def _load_tree(self, stage: str, tree: str, model: Model) -> Params:
        with self._stage_weights(stage, tree) as store:
            return store.restore(self.session.abstract_tree(model))[0]

    # -- evaluation

    def evaluate(self, split: str, trees: dict[str, Params], ranker: ModelReward | None = None) -> float | None:
        """Writes what is measured of ``trees`` on a split, and gives the score, where there is one."""
        metrics: dict[str, float] = {}
        before = self.compiles.programs  # what processes exchange has a program for each length
        shown: list[dict[str, Any]] = []
        if split in self.best_of_n and "reward_model" in trees:
            metrics |= self.best_of_n[split].run(trees["reward_model"])
        if split in self.preference_evaluators and self.preference_evaluators[split].tree in trees:
            metrics |= self.preference_evaluators[split].run(trees)
        is_judged = self.runner is not None or ranker is not None
        if split in self.evaluators and is_judged and "policy" in trees and "reward_model" not in trees:
            found, batches = self.evaluators[split].run(trees["policy"], self.progress.step, ranker)
            metrics |= found
            report_failures(self.writer, self.progress.step, batches)
            shown = show(batches, self.config.eval.shown_prompts)
        kind = ("evaluation", self.progress.stage, split, *sorted(trees), ranker is not None)
        self.compiles.check(kind, self.compiles.programs - before)
        if not metrics:
            return None
        prefix = "eval" if split == "test" else split
        self.writer.write(self.progress.step, "eval", {f"{prefix}/{name}": value for name, value in metrics.items()})
        self.writer.write_samples(self.progress.step, split, shown)
        self.writer.show_samples(shown)
        return metrics.get("score")


def open_training(session: Session, command: Sequence[str] = ()) -> Run:
    """Data, rewards, folder and checkpoints of a run, all checked; nothing is compiled yet. Raises ValueError."""
    config = session.config
    session.check_weights()
    _check_folders(session)
    sources, texts, runner, evaluators, comparisons = open_inputs(session)
    with ExitStack() as stack:
        if runner is not None:
            stack.enter_context(runner)
        _check_disk(session, sources)
        folder = open_run(
            session.folder,
            resolved(config),
            versions(seed=config.seed, command=command),
            identity_keys=identity_keys(config),
            process_index=jax.process_index(),
            gather=lambda number: agree(np.asarray(number), lambda stacked: stacked).tolist(),
        )
        checkpoints = stack.enter_context(
            Checkpointer(
                folder / "checkpoints",
                keep=config.checkpoint.keep,
                keep_best=int(config.checkpoint.keep_best),
                save_every_steps=config.checkpoint.every_steps,
            )
        )
        resumes = checkpoints.latest_step() is not None
        progress = Progress.from_json(checkpoints.position()) if resumes else Progress()
        writer = stack.enter_context(make_writer(session, folder, total_steps(config)))
        writer.truncate_after(progress.step if resumes else -1)
        preemption = stack.enter_context(Preemption())
        compiles = CompileCounter(writer.say)
        stack.callback(compiles.close)
        if not resumes:
            held_out = {split: evaluator.source for split, evaluator in evaluators.items()} | comparisons
            report_data(writer, config, sources, texts, held_out)
        return Run(
            session=session,
            runner=runner,
            writer=writer,
            checkpoints=checkpoints,
            preemption=preemption,
            compiles=compiles,
            sources=sources,
            texts=texts,
            evaluators=evaluators,
            comparisons=comparisons,
            progress=progress,
            open_things=stack.pop_all(),
        )


def _check_folders(session: Session) -> None:
    """That every model folder which a stage names is whole and has the head it needs. Raises ModelFolderError."""
    for name in session.config.recipe:
        stage = session.config.stage(name)
        algorithm = stage.algorithm()
        named = [(source, role == "reward_model") for role, source in frozen_sources(stage, algorithm).items()]
        if set(algorithm.trains) - {"policy"}:
            named.append((stage.critic.init_from, True))
        for source, is_scalar in named:
            if source not in ("start", "base", "policy", *session.config.recipe):
                find_params(source, session.scalar_model(source) if is_scalar else session.model_from(source))


def _check_disk(session: Session, sources: list[Any]) -> None:
    """Room for what the run keeps: the newest and best checkpoints, one being written, stages' weights, the model.

    A run that goes on has most of that already. Raises RunFolderError.
    """
    config, folder = session.config, session.folder
    if is_remote(folder):
        return
    named = zip(config.recipe, sources, strict=True)
    stages = [build_stage(session, config.stage(name), 0, source, None) for name, source in named]
    kept = 1 if (folder / "checkpoints").exists() else config.checkpoint.keep + int(config.checkpoint.keep_best) + 1
    states = kept * max(_bytes(abstract_saved(stage)) for stage in stages)
    weights = sum(_bytes(session.abstract_tree(model)) for stage in stages for model in stage.trees.values())
    exported = {tree: model for stage in stages for tree, model in stage.trees.items() if tree != "critic"}
    weights += int(config.checkpoint.export) * sum(_bytes(session.abstract_tree(m)) for m in exported.values())
    check_space(next(place for place in (folder, *folder.parents) if place.exists()), states + weights)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def finish(run: Run, stopped: str = "") -> None:
    """Write the trained policy and reward model as Hugging Face folders and say where everything is.

    Of a run that is through, or that a limit ``stopped``, which is said last.
    """
    if run.progress.step < total_steps(run.config) and not stopped:
        return
    session, progress = run.session, run.progress
    run.checkpoints.wait()
    if run.config.checkpoint.export:
        _export(run, "policy", session.folder / "model")
        _export(run, "reward_model", session.folder / "reward_model")
    counts = f"{progress.step} steps, {progress.episodes} episodes, {progress.tokens} tokens"
    run.writer.say(f"{'stopped' if stopped else 'done'}: {counts}")
    best = run.checkpoints.best() if run.config.checkpoint.keep_best else None
    if best is not None:
        run.writer.say(f"best on dev: step {best[1]}, score {best[0]:.3f}; its checkpoint is kept")
    for name, what in (
        ("metrics.jsonl", "one JSON object per line; docs/metrics.md explains the keys"),
        ("samples.jsonl", "completions before, during and after training"),
        ("checkpoints", "to train further, raise config.steps and run the same command"),
        ("model", "the trained policy, which transformers can load"),
        ("reward_model", "the trained reward model, as a transformers sequence classifier"),
    ):
        if (session.folder / name).exists():
            run.writer.say(f"  {session.folder / name}: {what}")
    run.writer.say(
        "next: change any setting with --config.KEY=VALUE (docs/config.md), or run another recipe in configs/"
    )
    if stopped:
        run.writer.event(progress.step, f"stopped: {stopped}; to go on from here, move that limit")
    # Who is through waits here for who still writes: the farewell of processes has a time limit.
    agree(np.asarray(0), np.max)


def _export(run: Run, tree: str, folder: Any) -> None:
    """The ``tree`` of the last stage that was reached and trains one."""
    session, tokenizer = run.session, run.session.tokenizer
    reached = run.config.recipe[: run.progress.stage + 1]
    trained = [name for name in reached if tree in run.config.stage(name).algorithm().trains]
    if not trained:
        return
    model = session.model if tree == "policy" else session.scalar_model(trained[-1])
    trees = run.trees if run.trees is not None and trained[-1] == reached[-1] else {}
    if tree in trees:
        params = trees[tree]
    else:
        params = run.load_policy(trained[-1]) if tree == "policy" else run.load_scalar(trained[-1], model)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.end_ids), "pad_token_id": tokenizer.pad_id}
    save_hf(folder, model, params, tokenizer.hf, generation_config=ids)


def total_steps(config: Config) -> int:
    """Loop steps over all stages."""
    return sum(config.stage(name).steps for name in config.recipe)
