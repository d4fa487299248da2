"""One run: where it stands, what it holds open, and how it is opened and finished."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from rljax.checkpoint import Checkpointer, Preemption
from rljax.compiles import CompileCounter
from rljax.config import Config, identity_keys, resolved
from rljax.data.batches import DataPosition, PromptSource, SupervisedSource
from rljax.data.overlap import count_overlap
from rljax.evaluate import Evaluator, show
from rljax.metrics import MetricsWriter
from rljax.models.decoder import Model, Params
from rljax.models.hf_export import save_hf
from rljax.models.hf_import import load_params
from rljax.rewards.runner import RewardRunner
from rljax.runs import check_space, is_remote, open_run, versions
from rljax.session import Session
from rljax.setup import make_writer, open_inputs
from rljax.sharding import agree
from rljax.stages import build_stage


@dataclass
class Progress:
    """Where a run stands: all of it is in the checkpoint, beside the state."""

    step: int = 0  # loop steps over all stages
    stage: int = 0
    stage_step: int = 0
    data: DataPosition = field(default_factory=DataPosition)
    bad_steps: int = 0  # skipped in a row
    prompts: int = 0
    episodes: int = 0
    tokens: int = 0
    scores: dict[str, float] = field(default_factory=dict)  # the latest of each split

    def to_json(self) -> dict[str, Any]:
        # Copies: a checkpoint is written in the background.
        return {**vars(self), "data": list(self.data), "scores": dict(self.scores)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        return cls(**{**values, "data": DataPosition(*values["data"])})


@dataclass
class Run:
    """The open things of one run; a context manager that closes them."""

    session: Session
    runner: RewardRunner | None
    writer: MetricsWriter
    checkpoints: Checkpointer
    preemption: Preemption
    compiles: CompileCounter
    sources: list[PromptSource | SupervisedSource]  # by stage
    texts: list[SupervisedSource | None]  # by stage, mixed into its steps
    evaluators: dict[str, Evaluator]
    progress: Progress
    open_things: ExitStack
    trees: dict[str, Params] | None = None  # what the last stage trained, when it is done
    traces: bool = False  # a profile is being taken

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

    def evaluate(self, split: str, trees: dict[str, Params]) -> None:
        evaluator = self.evaluators.get(split)
        if evaluator is None or "policy" not in trees:
            return
        metrics, batches = evaluator.run(trees["policy"], self.progress.step)
        self.progress.scores[split] = metrics["score"]
        prefix = "eval" if split == "test" else split
        self.writer.write(self.progress.step, "eval", {f"{prefix}/{name}": value for name, value in metrics.items()})
        shown = show(batches, self.config.eval.shown_prompts)
        self.writer.write_samples(self.progress.step, split, shown)


def open_training(session: Session, command: Sequence[str] = ()) -> Run:
    """Data, rewards, folder and checkpoints of a run, all checked; nothing is compiled yet. Raises ValueError."""
    config = session.config
    session.check_weights()
    sources, texts, runner, evaluators = open_inputs(session)
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
        compiles = CompileCounter()
        stack.callback(compiles.close)
        if not resumes:
            _report_data(writer, sources, evaluators)
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
            progress=progress,
            open_things=stack.pop_all(),
        )


def _check_disk(session: Session, sources: list[PromptSource | SupervisedSource]) -> None:
    """Room for what the run keeps: the newest and best checkpoints, one being written, stages' weights, the model.

    A run that goes on has most of that already. Raises RunFolderError.
    """
    config, folder = session.config, session.folder
    if is_remote(folder):
        return
    named = zip(config.recipe, sources, strict=True)
    stages = [build_stage(session, config.stage(name), 0, source, None) for name, source in named]
    kept = 1 if (folder / "checkpoints").exists() else config.checkpoint.keep + int(config.checkpoint.keep_best) + 1
    states = kept * max(_bytes(stage.abstract_saved()) for stage in stages)
    weights = sum(_bytes(session.abstract_tree(model)) for stage in stages for model in stage.trees.values())
    weights += int(config.checkpoint.export) * _bytes(session.abstract_policy())
    check_space(next(place for place in (folder, *folder.parents) if place.exists()), states + weights)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _report_data(writer: MetricsWriter, sources: list, evaluators: dict[str, Evaluator]) -> None:
    """Count, before the run, what training and evaluation share, what stands twice and what did not fit."""
    train = sources[-1]
    found = {split: count_overlap(train.rows, e.source.rows) for split, e in evaluators.items()}
    for split, overlap in found.items():
        if overlap.shared_ngrams:
            pairs = ", ".join(f"{split} {a} ~ train {b}" for a, b in overlap.examples)
            writer.say(f"warning: {split}: {overlap} (rows {pairs})")
    for split, kept in (("train", train.kept), *((split, e.source.kept) for split, e in evaluators.items())):
        if kept.dropped:
            writer.say(f"{split}: {kept}")
    writer.write(
        0,
        "data",
        {
            "data/overlap_exact": sum(overlap.exact for overlap in found.values()),
            "data/overlap_8gram": sum(overlap.shared_ngrams for overlap in found.values()),
            "data/duplicates": max((overlap.train_duplicates for overlap in found.values()), default=0),
            "data/too_long": train.kept.dropped,
        },
    )


def finish(run: Run) -> None:
    """Write the trained policy as a Hugging Face folder and say where everything is."""
    if run.progress.step < total_steps(run.config):
        return
    session, tokenizer = run.session, run.session.tokenizer
    trained = [name for name in run.config.recipe if "policy" in run.config.stage(name).algorithm().trains]
    run.checkpoints.wait()
    if run.config.checkpoint.export and trained:
        trees = run.trees if run.trees is not None and trained[-1] == run.config.recipe[-1] else None
        params = trees["policy"] if trees is not None else run.load_policy(trained[-1])
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": list(tokenizer.end_ids),
            "pad_token_id": tokenizer.pad_id,
        }
        save_hf(session.folder / "model", session.model, params, tokenizer.hf, generation_config=ids)
    run.writer.say(f"done: {run.progress.step} steps, {run.progress.episodes} episodes, {run.progress.tokens} tokens")
    for name, what in (
        ("metrics.jsonl", "one JSON object a line; docs/metrics.md explains the keys"),
        ("samples.jsonl", "what the policy wrote, before and after"),
        ("checkpoints", "the same command goes on from the newest"),
        ("model", "the trained policy; transformers loads it"),
    ):
        if (session.folder / name).exists():
            run.writer.say(f"  {session.folder / name}: {what}")
    # Who is through waits here for who still writes: the farewell of processes has a time limit.
    agree(np.asarray(0), np.max)


def total_steps(config: Config) -> int:
    """Loop steps over all stages."""
    return sum(config.stage(name).steps for name in config.recipe)
