"""Held-out rows of stages; for preference stages the reference scored once, best-of-n, centred rewards."""

from functools import partial
from typing import Any

import jax
import numpy as np

from rljax.data.batches import DataPosition, SupervisedSource
from rljax.data.rows import load_rows
from rljax.evaluate_preferences import BestOfN, PreferenceEvaluator
from rljax.evaluate_text import TextEvaluator
from rljax.models.decoder import Params
from rljax.reference import cache_logprobs, load_cache, save_cache
from rljax.run import Run
from rljax.sharding import gather, to_global
from rljax.stages import Stage
from rljax.steps import TrainState


def load_reference_caches(run: Run, stage: Stage) -> bool:
    """Whether an earlier start of the run has scored every row that this stage asks for."""
    if not stage.caches_reference:
        return False
    files = {split: _cache_file(run, stage, split) for split in _cached_sources(run, stage)}
    found = {split: load_cache(file) for split, file in files.items()}
    stage.cached_logprobs = {split: cache for split, cache in found.items() if cache is not None}
    return len(stage.cached_logprobs) == len(files)


def open_comparisons(run: Run, stage: Stage, origin: str, policy: Params | None) -> None:
    """Score the rows with the reference, let it go, and prepare the evaluations of the main stage."""
    if stage.caches_reference and stage.reference is not None:
        score = stage.program("score_reference", 1)
        for split, source in _cached_sources(run, stage).items():
            cache = cache_logprobs(score, stage.reference, source, stage.rows_per_step, run.session.train)
            save_cache(_cache_file(run, stage, split), cache)
            stage.cached_logprobs[split] = cache
        stage.frozen.pop("reference")
    if stage.config is not run.config or not stage.algorithm.trains:
        return
    for split, source in run.comparisons.items():
        if isinstance(source, SupervisedSource):
            run.preference_evaluators[split] = _text_evaluator(run, stage, source)
            continue
        forward = stage.forwards[stage.algorithm.trains[0]]
        reference = partial(stage.reference_logprobs, split=split) if stage.algorithm.needs & {"ref_logprobs"} else None
        run.preference_evaluators[split] = PreferenceEvaluator(
            stage.algorithm, forward, source, *_sizes(stage), reference
        )
    if "reward_model" in stage.algorithm.trains and run.config.eval.samples > 1:
        _draw_completions(run, stage, origin, policy)


def _text_evaluator(run: Run, stage: Stage, source: SupervisedSource) -> TextEvaluator:
    """At temperature 1, whatever the stage samples at."""
    return TextEvaluator(run.session.forward(None), source, *_sizes(stage), 0 if stage.config.batch.pack else None)


def _draw_completions(run: Run, stage: Stage, origin: str, policy: Params | None) -> None:
    """What a reward model chooses from: completions of the policy that its body came from, drawn once."""
    for split, evaluator in run.evaluators.items():
        policy = run.load_policy(origin) if policy is None else policy
        _, batches = evaluator.run(policy, run.progress.step)
        run.best_of_n[split] = BestOfN(stage.forwards["reward_model"], batches, run.config.eval)


def center_rewards(run: Run, stage: Stage, state: TrainState) -> TrainState:
    """The reward model's bias moved so that its mean score on the chosen rows is 0 (2403.17031, detail 15)."""
    critic = stage.config.critic
    if not critic.center_on or "reward_model" not in stage.algorithm.trains:
        return state
    model = state.params["reward_model"]
    scores = np.concatenate([*_reference_scores(run, stage, model)])
    bias = model["score_bias"] - scores.mean(dtype=np.float64).astype(scores.dtype)
    run.writer.event(run.progress.step, f"the reward's mean on {len(scores)} reference answers was {scores.mean():.4g}")
    placed = jax.device_put(bias, model["score_bias"].sharding)
    return state._replace(params={**state.params, "reward_model": {**model, "score_bias": placed}})


def _reference_scores(run: Run, stage: Stage, model: Params) -> Any:
    """Scores of ``center_rows`` answers, a step's rows at a time."""
    critic, data, rows = stage.config.critic, stage.config.data, stage.rows_per_step
    source = stage.source
    if critic.center_on != "chosen":
        texts = load_rows(critic.center_on, "train", columns=data.columns or None, limit=critic.center_rows or None)
        source = SupervisedSource(texts, run.session.tokenizer, data.row_length, data.seed, shuffle=False)
    unit = source.unit if critic.center_on == "chosen" else 1
    wanted = min(critic.center_rows or len(source), len(source))
    position, score = DataPosition(), stage.program("reward", 1)
    for start in range(0, wanted, rows // unit):
        _, batch, position = source.take(position, rows // unit)
        layout = run.session.train.rows
        placed = {"tokens": to_global(batch.tokens, layout), "valid": to_global(batch.valid, layout)}
        scores = gather(score(model, placed)).reshape(-1, unit)
        if critic.center_on == "chosen":
            best = np.where(batch.answer_valid, batch.scores, -np.inf).reshape(-1, unit).argmax(axis=1)
            scores = np.take_along_axis(scores, best[:, None], axis=1)
        yield scores[: wanted - start, 0]


def _cached_sources(run: Run, stage: Stage) -> dict[str, Any]:
    held_out = run.comparisons if stage.config is run.config else {}
    return {"train": stage.source, **held_out}


def _cache_file(run: Run, stage: Stage, split: str) -> Any:
    return run.session.folder / "stages" / run.config.recipe[stage.number] / f"reference_{split}.npz"


def _sizes(stage: Stage) -> tuple[int, int]:
    """Sequences of a call of an evaluation, and the pieces it goes through in: those of an update."""
    batch, rows = stage.config.batch, stage.rows_per_step
    micro = batch.micro_batch_rows or rows // batch.minibatches
    return rows, rows // micro
