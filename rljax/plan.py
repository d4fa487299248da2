"""What a run will do: the resolved config, the first prompts, and its memory by owner."""

import itertools
from typing import Any

import jax
import numpy as np

from rljax.config import Config, resolved
from rljax.data.batches import DataPosition, PromptSource
from rljax.memory_plan import PHASES, Owner, bytes_by_owner, peaks, prompt_length, row_length
from rljax.models.params import parameter_count
from rljax.runs import flatten
from rljax.session import Session
from rljax.setup import open_inputs
from rljax.stages import Stage, build_stage

SHOWN_PROMPTS = 2
GIB = 2**30


class PlanError(ValueError):
    """A plan that the devices cannot hold."""


def print_config(config: Config) -> None:
    """Every setting, every stage whole, as it could stand on the command line."""
    values = resolved(config)
    stages = values.pop("stages")
    for prefix, group in [("config", values), *((f"config.stages.{name}", stages[name]) for name in stages)]:
        for key, value in flatten(group).items():
            print(f"{prefix}.{key} = {value!r}")


def dry_run(session: Session) -> None:
    """Print the plan. Loads data, tokenizer and shapes; makes no weights, no folder, no program. Raises PlanError."""
    config = session.config
    sources, _, runner, evaluators, comparisons = open_inputs(session)
    if runner is not None:
        runner.close()
    train, decode = (dict(layout.mesh.shape) for layout in (session.train, session.decode))
    kind = session.train.mesh.devices.flat[0].device_kind
    print(f"model: {parameter_count(session.model):,} parameters, {session.model.config}")
    print(f"mesh: training {train}, rollouts {decode}, {session.train.mesh.size} x {kind}")
    for split, source in ({split: e.source for split, e in evaluators.items()} | comparisons).items():
        print(f"{split}: {source.kept}")
    ends = (f"{i} {session.tokenizer.hf.convert_ids_to_tokens(i)!r}" for i in session.tokenizer.end_ids)
    print(f"end tokens: {', '.join(ends)}")
    plans = []
    for number, (name, source) in enumerate(zip(config.recipe, sources, strict=True)):
        stage = build_stage(session, config.stage(name), number, source, runner)
        _print_stage(name, stage)
        owners = bytes_by_owner(stage)
        _print_owners(owners)
        plans.append((name, owners))
    for name, owners in plans:
        _check_memory(config, name, owners)


def _print_stage(name: str, stage: Stage) -> None:
    source, batch = stage.source, stage.config.batch
    told = f"rows from what {', '.join(stage.config.sampled_by)} samples" if source is None else source.kept
    print(f"\nstage {name}: {stage.config.steps} steps, {stage.optimizer_steps} optimizer steps; {told}")
    if source is not None:
        _print_rows(stage.session, source)
    micro = batch.micro_batch_rows or stage.rows_per_step // batch.minibatches
    shape = f"[{stage.rows_per_step}, {row_length(stage)}]"
    if stage.online:
        r, prompt = stage.config.rollout, prompt_length(stage)
        shape += f" ({r.prompts_per_step} prompts x {r.group_size}, {prompt} + {r.max_new_tokens} tokens)"
    print(f"  rows {shape}, {batch.minibatches} x {batch.epochs} optimizer steps, micro-batches [{micro}, ...]")


def _print_rows(session: Session, source: Any) -> None:
    _, rows, _ = source.take(DataPosition(), min(SHOWN_PROMPTS, len(source)))
    for tokens, valid, *rest in zip(*(np.asarray(leaf) for leaf in rows if leaf is not None), strict=True):
        mask = np.zeros_like(valid) if isinstance(source, PromptSource) else rest[0]
        _print_row(session, tokens, valid, mask)


def _print_row(session: Session, tokens: np.ndarray, valid: np.ndarray, mask: np.ndarray) -> None:
    """A row decoded, its ids, which columns are tokens, which are trained."""
    print(f"  {session.tokenizer.hf.decode(tokens[valid])!r}")
    print(f"    ids {tokens[valid].tolist()}")
    print(f"    valid {_runs(valid)}, trained {_runs(mask)}", end="")
    if mask.any():
        last = int(tokens[mask][-1])
        print(f", ends with {last} {session.tokenizer.hf.convert_ids_to_tokens(last)!r}", end="")
    print()


def _runs(mask: np.ndarray) -> str:
    """A mask as its runs: 0 x 12, 1 x 8."""
    return ", ".join(f"{int(bit)} x {len(list(run))}" for bit, run in itertools.groupby(mask.tolist()))


def _print_owners(owners: list[Owner]) -> None:
    print("  GiB a device by owner, an estimate:")
    for owner in owners:
        print(f"    {owner.when:<9}{owner.name:<20}{owner.bytes / GIB:9.3f}")
    for phase, total in peaks(owners).items():
        print(f"    {phase:<9}{'all':<20}{total / GIB:9.3f}")


def _check_memory(config: Config, name: str, owners: list[Owner]) -> None:
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = config.device_memory_gib * GIB or stats.get("bytes_limit")
    phase, total = max(peaks(owners).items(), key=lambda item: item[1])
    if limit:
        print(f"stage {name}: {total / limit:.0%} of the device's memory at its peak, in {phase}")
    if limit and total > limit:
        largest = sorted((o for o in owners if o.when in PHASES[phase]), key=lambda o: -o.bytes)[:2]
        raise PlanError(
            f"stage {name} needs about {total / GIB:.3g} GiB a device in {phase} and there are {limit / GIB:.3g}, "
            f"most of it for {' and '.join(f'{o.name} ({o.bytes / GIB:.3g})' for o in largest)}; use more devices, "
            "a larger tensor degree, fewer rows a step or a micro-batch, or model.remat=block"
        )
