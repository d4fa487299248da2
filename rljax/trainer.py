"""The training loop: stages, steps, evaluations, checkpoints, and limits that stop a run."""

import math
import time

import jax
import numpy as np

from rljax.collect import model_reward
from rljax.config import Config, StageConfig
from rljax.data.batches import DataPosition
from rljax.evaluate import report_failures, sample_records
from rljax.limits import limited, passed_limit
from rljax.models.decoder import Params
from rljax.offline import center_rewards, load_reference_caches, open_comparisons
from rljax.rollouts import ModelReward
from rljax.run import Run, total_steps
from rljax.samples import SampleWriter, open_source
from rljax.sharding import agree
from rljax.stage_models import frozen_sources
from rljax.stage_state import abstract_saved, restored, saved
from rljax.stage_steps import StepResult, collect_step, offline_step, online_step
from rljax.stages import Stage, build_stage
from rljax.steps import TrainState
from rljax.usage import usage_metrics


class RunStopped(RuntimeError):
    """A limit of the config was passed; the message says which and by what."""


def train(run: Run) -> None:
    """All stages of the recipe, from where the run stands. Leaves early, saved, where it was asked to (SIGTERM).

    Raises RunStopped, evaluated and saved, where the last step passed a limit: also of a stopped run that is started
    again, which trains nothing until that limit is moved.
    """
    for number, name in enumerate(run.config.recipe):
        if run.progress.stopped:
            _stop_past_limits(run)
        config = run.config.stage(name)
        done = run.progress.stage == number and run.progress.stage_step >= config.steps > 0
        if run.progress.stage > number or done:
            continue
        run.trees = _run_stage(run, number, name, config)
        if run.trees is None:
            return
    _stop_past_limits(run)


def _stop_past_limits(run: Run) -> None:
    if reason := _passed_limit(run):
        raise RunStopped(reason)


def _passed_limit(run: Run) -> str:
    progress = run.progress
    return passed_limit(run.config.limits, progress.step, progress.bad_steps, progress.limited)


def _run_stage(run: Run, number: int, name: str, config: StageConfig) -> dict[str, Params] | None:
    """What the stage trained, at its end or where a limit stopped it; None where the run was asked to leave."""
    session, progress = run.session, run.progress
    stage = build_stage(session, config, number, open_source(run, number), run.runner, run.texts[number])
    origin = _origin(run.config, number)
    if progress.stage == number and progress.stage_step > 0:
        state = _restore(run, stage, origin)
    else:
        progress.stage, progress.stage_step, progress.data = number, 0, DataPosition()
        trees = _starting_trees(run, stage, origin)
        _freeze_models(run, stage, origin, trees.get("policy"))
        open_comparisons(run, stage, origin, trees.get("policy"))
        ranker = _ranker(run, stage) if run.runner is None else None  # where rewards judge, there is no need of it yet
        is_first = progress.step == 0 or ranker is not None
        if is_first and (config.steps > 0 or name == run.config.recipe[-1]):
            _evaluate_opening(run, trees, ranker)
        state = stage.start({tree: trees[tree] for tree in stage.trees})
        if config.steps == 0:  # a stage switched off: the next one starts from what this one did
            run.save_stage(name, state.params)
    samples = run.open_things.enter_context(SampleWriter(run, name))
    stopped = ""
    while progress.stage_step < config.steps and not stopped:
        state = _one_step(run, stage, state, samples)
        leave = run.preemption.reached(progress.step)
        stopped = _passed_limit(run)
        progress.stopped = bool(stopped)
        if progress.stage_step == config.steps:
            state = center_rewards(run, stage, state)
        last = progress.stage_step == config.steps or bool(stopped)
        _evaluate_and_save(run, stage, state, samples, last=last, leave=leave)
        if leave and not stopped and progress.step < total_steps(run.config):
            run.checkpoints.wait()
            run.writer.event(
                progress.step, f"interrupted: step {progress.step} is saved; run the same command to resume"
            )
            return None
    return state.params


def _evaluate_opening(run: Run, trees: dict[str, Params], ranker: ModelReward | None) -> None:
    """Both splits, but for what is written: of the stage before, or of this one, cut before its first save."""
    for split, prefix in (("test", "eval"), ("dev", "dev")):
        written = np.asarray(run.writer.has(run.progress.step, f"{prefix}/score"))
        if not agree(written, np.max):
            run.evaluate(split, trees, ranker)


def _evaluate_and_save(
    run: Run, stage: Stage, state: TrainState, samples: SampleWriter, *, last: bool, leave: bool
) -> None:
    """What is due after a step. The ``last`` of a stage is evaluated and kept; so is the best so far on dev."""
    progress, every, score = run.progress, run.config.eval.every_steps, None
    ranker = _ranker(run, stage)
    evaluates = last or (every > 0 and progress.step % every == 0)
    if evaluates:
        score = run.evaluate("dev", state.params, ranker)
    if last:
        run.evaluate("test", state.params, ranker)
        run.save_stage(run.config.recipe[stage.number], state.params)
    best = score is not None and score > (-math.inf if progress.best_dev is None else progress.best_dev)
    progress.best_dev = score if best else progress.best_dev
    force = last or leave or (best and run.config.checkpoint.keep_best)
    saves = run.checkpoints.is_due(progress.step, force)
    if evaluates or saves:
        run.writer.flush()
        samples.flush()
    if saves:
        run.checkpoints.save(progress.step, saved(stage, state), progress.to_json(), score=score, force=force)


def _ranker(run: Run, stage: Stage) -> ModelReward | None:
    """The stage's reward model in evaluations: it judges where nothing else does, and picks among samples."""
    found = model_reward(stage)
    return found._replace(weight=0.0) if found is not None and run.runner is not None else found


def _one_step(run: Run, stage: Stage, state: TrainState, samples: SampleWriter) -> TrainState:
    progress, before = run.progress, run.compiles.count
    _start_trace(run)
    step = offline_step if not stage.online else online_step if stage.algorithm.trains else collect_step
    result = step(stage, state, progress.data, progress.stage_step)
    progress.step += 1
    progress.stage_step += 1
    progress.data = result.position
    _count(run, stage, result)
    kind = (stage.number, stage.last_head_from, result.metrics.get("train/rounds", 1) > 1)
    run.compiles.check(kind, run.compiles.count - before)
    _stop_trace(run)
    before, every = run.compiles.count, stage.config.reference_reset_steps
    stage.update_reference(result.state, progress.stage_step)
    resets = every > 0 and progress.stage_step % every == 0
    run.compiles.check(("reference", stage.number, resets), run.compiles.count - before)
    run.writer.write(progress.step, run.config.recipe[stage.number], result.metrics)
    if result.completions is not None:
        report_failures(run.writer, progress.step, [result.completions])
    _write_step_samples(run, result)
    samples.write(progress.step, result.completions)
    progress.limited = limited(result.metrics)
    return result.state


def _count(run: Run, stage: Stage, result: StepResult) -> None:
    progress, metrics, config = run.progress, result.metrics, stage.config
    rounds = int(metrics.get("train/rounds", 1))
    drawn = stage.rows_per_step // stage.algorithm.unit
    progress.prompts += rounds * config.rollout.prompts_per_step if stage.online else drawn
    progress.episodes += rounds * config.rollout_rows if stage.online else drawn
    progress.tokens += int(metrics.pop("tokens"))
    progress.bad_steps = progress.bad_steps + 1 if metrics["train/skipped"] else 0
    metrics |= {
        "train/prompts": progress.prompts,
        "train/episodes": progress.episodes,
        "train/tokens": progress.tokens,
        "train/epoch": progress.data.epoch + progress.data.taken / max(len(stage.source), 1),
        **usage_metrics(run.session, metrics, trained=stage.trees.values(), passes=config.passes),
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


def _origin(config: Config, number: int) -> str:
    """The stage whose final policy this one starts from, or base."""
    init_from = config.stage(config.recipe[number]).init_from
    if init_from != "previous":
        return init_from
    trained = [name for name in config.recipe[:number] if "policy" in config.stage(name).algorithm().trains]
    return trained[-1] if trained else "base"


def _starting_trees(run: Run, stage: Stage, origin: str) -> dict[str, Params]:
    """The policy that the stage starts from, and what it trains beside it."""
    session, critic = run.session, stage.config.critic
    trees = {"policy": run.load_policy(origin)}
    for tree, model in stage.trees.items():
        if tree != "policy" and critic.init_from == "policy":
            trees[tree] = session.with_scalar_head(trees["policy"], model, critic.seed)
        elif tree != "policy":
            trees[tree] = run.load_scalar(critic.init_from, model)
    return trees


def _freeze_models(run: Run, stage: Stage, origin: str, policy: Params | None) -> None:
    for name, named in frozen_sources(stage.config, stage.algorithm).items():
        source = origin if named == "start" else named
        if name == "reference" and load_reference_caches(run, stage):
            continue
        if name == "reward_model":
            stage.freeze(name, run.load_scalar(source, stage.forwards[name].model))
        elif policy is not None and source == origin:
            stage.freeze(name, policy)
        else:
            stage.freeze(name, run.load_policy(source, stage.forwards[name].model))


def _restore(run: Run, stage: Stage, origin: str) -> TrainState:
    start = time.perf_counter()
    tree, _ = run.checkpoints.restore(abstract_saved(stage))
    run.checkpoints.delete_after(run.progress.step)
    _freeze_models(run, stage, origin, None)
    state = restored(stage, tree)
    open_comparisons(run, stage, origin, None)
    run.writer.event(
        run.progress.step, f"resuming from step {run.progress.step} ({time.perf_counter() - start:.1f} s to restore)"
    )
    return state


def _start_trace(run: Run) -> None:
    if run.config.profile_steps and run.progress.step + 1 == run.config.profile_steps[0]:
        jax.profiler.start_trace(str(run.session.folder / "trace"))
        run.traces = True


def _stop_trace(run: Run) -> None:
    if run.traces and run.progress.step >= run.config.profile_steps[1]:
        jax.profiler.stop_trace()
        run.traces = False
