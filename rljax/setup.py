"""From the names in a config to data sources, rewards and evaluators."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from etils import epath

from rljax.config import Config, ConfigError, DataConfig, StageConfig, resolved
from rljax.data.batches import PromptSource, SupervisedSource, prompt_of
from rljax.data.preferences import (
    PreferenceSource,
    held_out_by_prompt,
    is_comparison,
    read_comparison_prompt,
    rows_of_split,
)
from rljax.data.rows import GENERATED, DataError, Row, load_rows
from rljax.data.select import labelled, split_by_gap
from rljax.data.steps import StepSource
from rljax.evaluate import Evaluator
from rljax.metrics import MetricsWriter
from rljax.rewards import load_reward
from rljax.rewards.base import Sample
from rljax.rewards.runner import RewardRunner
from rljax.session import Session


class Inputs(NamedTuple):
    """What a run reads and judges with."""

    sources: list[Any]  # by stage: prompts, text, comparisons or labelled steps; None: sampled by an earlier stage
    texts: list[SupervisedSource | None]  # by stage, mixed into its steps
    runner: RewardRunner | None
    evaluators: dict[str, Evaluator]
    comparisons: dict[str, Any]  # held-out text or comparisons of the main stage's kind, by split


def open_inputs(session: Session) -> Inputs:
    """Data, rewards and evaluations of a run, tried on a row of each data set. Raises ValueError."""
    config = session.config
    stages = [config.stage(name) for name in config.recipe]
    sources = [None if stage.sampled_by else make_source(session, stage) for stage in stages]
    texts = [make_text_mix(session, config.stage(name)) for name in config.recipe]
    runner = make_runner(config)
    try:
        evaluators = make_evaluators(session, runner)
        if runner is not None:
            prompts = [source for source in sources if isinstance(source, PromptSource)]
            _try_rewards(session, runner, [*prompts, *(evaluator.source for evaluator in evaluators.values())])
    except BaseException:
        if runner is not None:
            runner.close()
        raise
    return Inputs(sources, texts, runner, evaluators, make_comparisons(session))


def _try_rewards(session: Session, runner: RewardRunner, sources: list[PromptSource]) -> None:
    """Every reward on the first row of each data set, with its own answer for a completion."""
    first = {str(row.get("dataset", "")): row for source in sources for row in reversed(source.rows)}
    for row in first.values():
        answer = row.get("solution") if row.get("solution") is not None else row.get("answer", "")
        prompt = session.tokenizer.decode(session.tokenizer.render(prompt_of(row, 0)))
        runner.check(Sample(prompt=prompt, completion=str(answer), messages=row.get("messages"), row=row))


def split_rows(data: DataConfig, split: str) -> list[Row]:
    """The rows of train, dev or test; [] for a split the config does not have. Raises DataError."""
    if data.splits_by_prompt:
        count = {"train": data.train_rows, "dev": data.dev_rows, "test": data.test_rows}[split]
        rows = rows_of_split(_load(data, data.train, "train", 0), split, seed=data.seed)
        return rows[:count] if count else rows
    held_out = 0 if data.dev else data.dev_rows
    if split == "train" or (split == "dev" and held_out):
        rows = _load(data, data.train, "train", data.train_rows and data.train_rows + held_out)
        if len(rows) <= held_out:
            raise ConfigError(f"config.data.dev_rows is {held_out} and {data.train} has {len(rows)} rows to train on")
        if is_comparison(rows[0]):
            return held_out_by_prompt(rows, held_out)[split == "dev"]
        return rows[: len(rows) - held_out] if split == "train" else rows[-held_out:]
    if split == "dev" and not data.dev:
        return []
    source = data.dev if split == "dev" else data.test
    return _load(data, source, split, data.dev_rows if split == "dev" else data.test_rows) if source else []


def _load(data: DataConfig, source: str, split: str, count: int) -> list[Row]:
    if not source:
        raise ConfigError("config.data.train is not set: name a file, a folder, a Hub data set or a generated task")
    options: dict[str, Any] = dict(data.options)
    if source in GENERATED and count:
        options["count"] = count
    return load_rows(source, split, columns=data.columns or None, options=options or None, limit=count or None)


def make_source(session: Session, stage: StageConfig, rows: list[Row] | None = None) -> Any:
    """A stage's training rows, as prompts for an online algorithm, else as text, comparisons or labelled steps.

    ``rows`` stand for those of ``data.train``.
    """
    with _rows_of(stage.data.train):
        rows = stage_rows(stage) if rows is None else rows
        return prompt_source(session, stage.data, rows) if stage.is_online else _offline_source(session, stage, rows)


@contextmanager
def _rows_of(source: str) -> Iterator[None]:
    """A refused row is said with where it comes from."""
    try:
        yield
    except DataError as error:
        if source in str(error):
            raise
        raise DataError(f"{error} (rows of {source}, counted from 0)") from error


def _source_of(data: DataConfig, split: str) -> str:
    return (data.test if split == "test" else data.dev) or data.train


def stage_rows(stage: StageConfig) -> list[Row]:
    """The training rows of a stage with a source of its own: all, or its part of scored pairs."""
    rows = split_rows(stage.data, "train")
    if stage.select.gap:
        rows = split_by_gap(rows, stage.select.gap_threshold, stage.select.gap)
        if not rows:
            raise ConfigError(
                f"no pair of {stage.data.train} is {stage.select.gap} at select.gap_threshold "
                f"{stage.select.gap_threshold:g}; move it"
            )
    return [prompt_row(row, number) for number, row in enumerate(rows)] if stage.is_online else rows


def prompt_row(row: Row, number: int) -> Row:
    """A row to complete; of a comparison without a prompt of its own, the prompt that its answers share."""
    if row.get("prompt") is not None or not is_comparison(row):
        return row
    return {**row, "prompt": read_comparison_prompt(row, number)}


def prompt_source(session: Session, data: DataConfig, rows: list[Row], *, shuffle: bool = True) -> PromptSource:
    """Prompts to complete, behind the prefix that ``data`` gives them."""
    rows = [labelled(row, data.prompt_prefix) for row in rows] if data.prompt_prefix else rows
    return PromptSource(rows, session.tokenizer, data.prompt_lengths, data.seed, shuffle=shuffle)


def _offline_source(session: Session, stage: StageConfig, rows: list[Row], *, shuffle: bool = True) -> Any:
    data, algorithm, tokenizer = stage.data, stage.algorithm(), session.tokenizer
    if algorithm.rows == "text":
        return SupervisedSource(rows, tokenizer, data.row_length, data.seed, shuffle=shuffle)
    if algorithm.rows == "steps":
        return StepSource(rows, tokenizer, data.row_length, data.seed, shuffle=shuffle)
    kind: Any = algorithm.rows
    return PreferenceSource(
        rows,
        tokenizer,
        data.row_length,
        data.seed,
        kind=kind,
        unit=algorithm.unit,
        shuffle=shuffle,
        bad_rows=data.bad_rows,
    )


def make_comparisons(session: Session) -> dict[str, Any]:
    """Held-out rows that are read and not completed: of the kind that the main stage trains on.

    Text is among them only where no reward judges completions; of a stage on what it samples, rows with a solution.
    """
    config = session.config
    if "main" not in config.recipe:
        return {}
    is_text = config.algorithm().rows == "text"  # or what it samples
    if is_text and (config.reward.names or config.reward_model_from):
        return {}
    found = {split: split_rows(config.data, split) for split in ("dev", "test")}
    sources = {}
    for split, rows in found.items():
        if rows and _is_read(config, rows[0]):
            known = session.model.config.max_positions
            if config.data.row_length > known:
                raise ConfigError(
                    f"config.data.row_length {config.data.row_length} is more than the model's {known} positions"
                )
            with _rows_of(_source_of(config.data, split)):
                sources[split] = _offline_source(session, config, rows, shuffle=False)
    return sources


def _is_read(config: Config, row: Row) -> bool:
    """Whether a held-out row is of the kind that the main stage trains on: others are prompts for its rewards."""
    if config.algorithm().rows != "text":
        return is_comparison(row) or not config.reward.names
    return not config.is_online or row.get("solution") is not None


def make_text_mix(session: Session, stage: StageConfig) -> SupervisedSource | None:
    """The text that a stage mixes into its steps; None where it mixes none."""
    mix = stage.text_mix
    if not mix.coef:
        return None
    data = replace(stage.data, train=mix.train, train_rows=mix.train_rows, columns=mix.columns, options=mix.options)
    with _rows_of(mix.train):
        rows = _load(data, mix.train, "train", mix.train_rows)
        return SupervisedSource(rows, session.tokenizer, mix.row_length, stage.data.seed)


def make_runner(config: Config) -> RewardRunner | None:
    """The main job's rewards, which evaluations use as well; None for a run without rewards."""
    r = config.reward
    if not r.names:
        return None
    weights = r.weights or (1.0,) * len(r.names)
    loaded = [load_reward(name, **r.options.get(name, {})) for name in r.names]
    rewards = list(zip(r.names, loaded, weights, strict=True))
    return RewardRunner(
        rewards, workers=r.workers, timeout_s=r.timeout_s, failed_value=r.failed_value, processes=r.processes
    )


def make_evaluators(session: Session, runner: RewardRunner | None) -> dict[str, Evaluator]:
    """One for each held-out split that the main job has, where rewards or a reward model judge completions."""
    config = session.config
    if runner is None and not ("main" in config.recipe and config.reward_model_from and config.is_online):
        return {}
    data = config.data
    found = {split: split_rows(data, split) for split in ("dev", "test")}
    evaluators = {}
    for split, rows in found.items():
        if rows:
            with _rows_of(_source_of(data, split)):
                source = prompt_source(session, data, rows, shuffle=False)
            evaluators[split] = Evaluator(session, source, runner, split)
    return evaluators


def make_writer(session: Session, folder: epath.Path, total_steps: int) -> MetricsWriter:
    log = session.config.log
    return MetricsWriter(
        folder,
        is_writer=jax.process_index() == 0,
        total_steps=total_steps,
        tensorboard=log.tensorboard,
        wandb=log.wandb,
        config=resolved(session.config),
    )
