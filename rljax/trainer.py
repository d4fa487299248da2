"""The loop: stages in order, steps in each, evaluations, checkpoints, and the rules that stop a run."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from rljax.checkpoint import Checkpointer, Preemption
from rljax.compiles import CompileCounter
from rljax.config import Config, StageConfig, identity_keys, resolved
from rljax.data.batches import DataPosition, PromptSource, SupervisedSource
from rljax.data.overlap import count_overlap
from rljax.evaluate import Evaluator, sample_records, show
from rljax.metrics import MetricsWriter
from rljax.models.decoder import Params
from rljax.models.hf_export import save_hf
from rljax.rewards.runner import RewardRunner
from rljax.runs import check_space, is_remote, open_run, versions
from rljax.session import Session
from rljax.setup import make_writer, open_inputs
from rljax.sharding import agree
from rljax.stages import Stage, StepResult, build_stage, offline_step, online_step
from rljax.steps import TrainState
from rljax.usage import usage_metrics


class RunStopped(RuntimeError):
    """A limit of the config was passed; the message says which and by what."""


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
    evaluators: dict[str, Evaluator]
    progress: Progress
    open_things: ExitStack
    params: Params | None = None  # the policy when the last stage is done
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

    def _stage_weights(self, name: str) -> Checkpointer:
        return Checkpointer(self.session.folder / "stages" / name, keep=1, keep_best=0)

    def save_stage(self, name: str, params: Params) -> None:
        with self._stage_weights(name) as store:
            store.save(self.progress.stage_step, params, {}, force=True)  # a stage may be prolonged later
            store.wait()

    def load_stage(self, name: str) -> Params:
        if name == "base":
            return self.session.base_params()
        with self._stage_weights(name) as store:
            return store.restore(self.session.abstract_policy())[0]

    # -- evaluation

    def evaluate(self, split: str, params: Params) -> None:
        evaluator = self.evaluators.get(split)
        if evaluator is None:
            return
        metrics, batches = evaluator.run(params, self.progress.step)
        self.progress.scores[split] = metrics["score"]
        prefix = "eval" if split == "test" else split
        self.writer.write(self.progress.step, "eval", {f"{prefix}/{name}": value for name, value in metrics.items()})
        shown = show(batches, self.config.eval.shown_prompts)
        self.writer.write_samples(self.progress.step, split, shown)


def open_training(session: Session, command: Sequence[str] = ()) -> Run:
    """Data, rewards, folder and checkpoints of a run, all checked; nothing is compiled yet. Raises ValueError."""
    config = session.config
    session.check_weights()
    sources, runner, evaluators = open_inputs(session)
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
        writer = stack.enter_context(make_writer(session, folder, _total_steps(config)))
        writer.truncate_after(progress.step if resumes else -1)
        preemption = stack.enter_context(Preemption())
        compiles = CompileCounter()
        stack.callback(compiles.close)
        if not resumes:
            _report_data(writer, sources, evaluators)
        return Run(
            session, runner, writer, checkpoints, preemption, compiles, sources, evaluators, progress, stack.pop_all()
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
    weights = (len(stages) + int(config.checkpoint.export)) * _bytes(session.abstract_policy())
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


def train(run: Run) -> None:
    """All stages of the recipe, from where the run stands. Leaves early, saved, where it was asked to (SIGTERM)."""
    for number, name in enumerate(run.config.recipe):
        config = run.config.stage(name)
        done = run.progress.stage == number and run.progress.stage_step >= config.steps > 0
        if run.progress.stage > number or done:
            continue
        run.params = _run_stage(run, number, name, config)
        if run.params is None:
            return


def finish(run: Run) -> None:
    """Write the trained policy as a Hugging Face folder and say where everything is."""
    if run.progress.step < _total_steps(run.config):
        return
    session, tokenizer = run.session, run.session.tokenizer
    params = run.params if run.params is not None else run.load_stage(run.config.recipe[-1])
    run.checkpoints.wait()
    if run.config.checkpoint.export:
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


def _run_stage(run: Run, number: int, name: str, config: StageConfig) -> Params | None:
    session, progress = run.session, run.progress
    stage = build_stage(session, config, number, run.sources[number], run.runner)
    origin = _origin(run.config, number)
    if progress.stage == number and progress.stage_step > 0:
        state = _restore(run, stage, origin)
    else:
        progress.stage, progress.stage_step, progress.data = number, 0, DataPosition()
        params = run.load_stage(origin)
        if progress.step == 0:
            run.evaluate("test", params)
            run.evaluate("dev", params)
        _set_reference(run, stage, origin, params)
        state = stage.start(params)
    while progress.stage_step < config.steps:
        state = _one_step(run, stage, state)
        last = progress.stage_step == config.steps
        leave = run.preemption.reached(progress.step)
        every = run.config.eval.every_steps
        evaluated = last or (every > 0 and progress.step % every == 0)
        if evaluated:
            run.evaluate("dev", state.params["policy"])
        if last:
            run.evaluate("test", state.params["policy"])
            run.save_stage(name, state.params["policy"])
        score = progress.scores.get("dev") if evaluated else None  # an older policy's says nothing of this one
        run.writer.flush()
        run.checkpoints.save(progress.step, stage.saved(state), progress.to_json(), score=score, force=last or leave)
        if leave and progress.step < _total_steps(run.config):
            run.checkpoints.wait()
            run.writer.event(
                progress.step, f"asked to leave: step {progress.step} is saved; the same command goes on from there"
            )
            return None
    return state.params["policy"]


def _one_step(run: Run, stage: Stage, state: TrainState) -> TrainState:
    progress, before = run.progress, run.compiles.count
    _start_trace(run)
    result = (online_step if stage.online else offline_step)(stage, state, progress.data, progress.stage_step)
    progress.step += 1
    progress.stage_step += 1
    progress.data = result.position
    _count(run, stage, result)
    kind = (stage.number, stage.last_head_from, result.metrics.get("train/rounds", 1) > 1)
    run.compiles.check(kind, before)
    _stop_trace(run)
    stage.update_reference(result.state, progress.stage_step)
    run.writer.write(progress.step, run.config.recipe[stage.number], result.metrics)
    _write_step_samples(run, result)
    _apply_limits(run, result.metrics)
    return result.state


def _count(run: Run, stage: Stage, result: StepResult) -> None:
    progress, metrics = run.progress, result.metrics
    rows = stage.rows_per_step
    group = stage.config.rollout.group_size if stage.online else 1
    rounds = int(metrics.get("train/rounds", 1))
    progress.prompts += rounds * rows // group
    progress.episodes += rounds * rows
    progress.tokens += int(metrics.pop("tokens"))
    progress.bad_steps = progress.bad_steps + 1 if metrics["train/skipped"] else 0
    metrics |= {
        "train/prompts": progress.prompts,
        "train/episodes": progress.episodes,
        "train/tokens": progress.tokens,
        "train/epoch": progress.data.epoch + progress.data.taken / max(len(stage.source), 1),
        **usage_metrics(run.session, metrics),
    }


def _write_step_samples(run: Run, result: StepResult) -> None:
    """The best, the worst and random completions of the step."""
    wanted, done = run.config.log.samples_per_step, result.completions
    if not wanted or done is None:
        return
    written = np.flatnonzero(done.host.loss_mask.any(axis=1)).tolist()
    ranked = sorted(written, key=lambda i: (done.rewards[i], i))
    middle = np.random.default_rng([run.config.seed, run.progress.step]).permutation(ranked[1:-1])[: max(wanted - 2, 0)]
    chosen = list(dict.fromkeys([*ranked[-1:], *middle.tolist(), *ranked[:1]]))[:wanted]
    run.writer.write_samples(run.progress.step, "train", sample_records(done, chosen))


def _apply_limits(run: Run, metrics: dict[str, float]) -> None:
    """One rule for every limit: passed means stopped, with the numbers. The same on every process."""
    limits = run.config.limits
    if limits.bad_steps and run.progress.bad_steps >= limits.bad_steps:
        raise RunStopped(
            f"{run.progress.bad_steps} steps in a row had a loss or a gradient that is not finite "
            "(config.limits.bad_steps); "
            "lower the learning rate or look at train/grad_norm and train/max_log_ratio before it began"
        )
    rules = (
        ("kl_per_completion", "train/kl_per_completion", 1),
        ("max_completion_length", "train/completion_length", 1),
        ("min_completion_length", "train/completion_length", -1),
        ("perplexity", "train/perplexity", 1),
    )
    for name, key, sign in rules:
        limit = vars(limits)[name]
        if limit and key in metrics and sign * metrics[key] > sign * limit:
            raise RunStopped(
                f"step {run.progress.step}: {key} is {metrics[key]:.4g}, past config.limits.{name} {limit:g}"
            )


def _origin(config: Config, number: int) -> str:
    """The stage whose final weights this one starts from, or base."""
    init_from = config.stage(config.recipe[number]).init_from
    if init_from == "previous":
        return config.recipe[number - 1] if number else "base"
    return init_from


def _set_reference(run: Run, stage: Stage, origin: str, params: Params | None) -> None:
    if "ref_logprobs" not in stage.algorithm.needs:
        return
    source = origin if stage.config.reference_from == "start" else stage.config.reference_from
    stage.freeze_reference(params if params is not None and source == origin else run.load_stage(source))


def _restore(run: Run, stage: Stage, origin: str) -> TrainState:
    start = time.perf_counter()
    saved, _ = run.checkpoints.restore(stage.abstract_saved())
    run.checkpoints.delete_after(run.progress.step)
    state = stage.restored(saved)
    if stage.reference is None:
        _set_reference(run, stage, origin, None)
    run.writer.event(
        run.progress.step, f"going on from step {run.progress.step} ({time.perf_counter() - start:.1f} s to restore)"
    )
    return state


def _total_steps(config: Config) -> int:
    return sum(config.stage(name).steps for name in config.recipe)


def _start_trace(run: Run) -> None:
    if run.config.profile_steps and run.progress.step + 1 == run.config.profile_steps[0]:
        jax.profiler.start_trace(str(run.session.folder / "trace"))
        run.traces = True


def _stop_trace(run: Run) -> None:
    if run.traces and run.progress.step >= run.config.profile_steps[1]:
        jax.profiler.stop_trace()
        run.traces = False
