"""From prompts to scored completions: rollout on the devices, text and rewards on the hosts, one view for all."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from rljax.data.batches import PromptBatch
from rljax.rewards.base import Sample
from rljax.rewards.runner import RewardRunner, Scored
from rljax.sampler import Generate
from rljax.session import Session
from rljax.sharding import agree, agree_text, gather, owned_rows, to_global
from rljax.types import FINISH_END, Prompts, Rollout

Row = dict[str, Any]

# Room for the names of rewards' parts where processes exchange them.
PART_NAMES_CHARS = 4000


class Completions(NamedTuple):
    """One rollout program's result, on the devices and on every host, with what the rewards said."""

    rollout: Rollout  # global arrays in the training layout
    host: Any  # the same Rollout as NumPy arrays
    rows: list[Row]
    rewards: np.ndarray  # [b]
    correct: np.ndarray  # [b] 1 right, 0 wrong, -1 nobody judges
    parts: dict[str, np.ndarray]  # each reward's own value, and its parts as name/part, nan where it has none; [b]
    dense: np.ndarray | None  # [b, t] what rewards gave to single tokens; None where none did
    failures: int
    samples: dict[int, Sample]  # this process's rows by number
    answers: dict[int, str | None]
    rollout_s: float
    reward_s: float

    @property
    def lengths(self) -> np.ndarray:
        return self.host.loss_mask.sum(axis=1)

    def part(self, name: str) -> np.ndarray:
        """One of ``parts``; nan for one that no reward of these rows has."""
        return self.parts.get(name, np.full(len(self.rows), np.nan))

    @property
    def finished(self) -> np.ndarray:
        return self.host.finish_reason == FINISH_END


class ModelReward(NamedTuple):
    """A reward model on the devices: ``scores(rollout) -> [b]``, and what the sum of rewards takes of it."""

    scores: Callable[[Rollout], Any]
    weight: float


def complete(
    session: Session,
    generate: Generate,
    params: Any,
    prompts: PromptBatch,
    rows: Sequence[Row],
    runner: RewardRunner | None,
    key: PRNGKeyArray,
    version: int,
    model_reward: ModelReward | None = None,
) -> Completions:
    """Complete every prompt and score what was written. ``prompts`` and ``rows`` are whole on every process."""
    start = time.perf_counter()
    layout = session.train.rows
    placed = Prompts(*(to_global(np.asarray(leaf), layout) for leaf in prompts))
    rollout = jax.block_until_ready(generate(params, placed, key, jnp.int32(version)))
    host = gather(rollout)
    middle = time.perf_counter()
    mine = np.flatnonzero(owned_rows(layout, len(rows), jax.process_index()) & host.valid.any(axis=1))
    samples = {i: _sample(session, host, rows[i], i) for i in mine.tolist()}
    values = np.zeros((3, len(rows)))
    values[1, mine] = -1
    parts: dict[str, np.ndarray] = {}
    answers: dict[int, str | None] = dict.fromkeys(samples)
    if runner is not None:
        scored = runner.score(list(samples.values()))
        values[0, mine] = scored.values
        values[1, mine] = [-1 if c is None else int(c) for c in scored.correct]
        np.add.at(values[2], mine[[f.index for f in scored.failures]], 1)
        parts = _parts(runner, scored, mine, len(rows))
        answers = dict(zip(samples, scored.answers, strict=True))
    values = _owners(values)
    if model_reward is not None:
        parts["model"] = gather(model_reward.scores(rollout)).astype(float)
        values[0] += model_reward.weight * parts["model"]
    return Completions(
        rollout=rollout,
        host=host,
        rows=list(rows),
        rewards=values[0],
        correct=values[1].astype(int),
        parts=parts,
        dense=None,
        failures=int(values[2].sum()),
        samples=samples,
        answers=answers,
        rollout_s=middle - start,
        reward_s=time.perf_counter() - middle,
    )


def _owners(values: np.ndarray) -> np.ndarray:
    """Exactly one process owns a row; the others hold zeros, so the sum is the owner's value to the last bit."""
    return agree(values, lambda stacked: stacked.sum(axis=0))


def _parts(runner: RewardRunner, scored: Scored, mine: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """Completions.parts: of this process's rows ``mine``, and through their owners of all others."""
    own = json.dumps(sorted({name for parts in scored.parts for name in parts}))
    # Of one width: the exchange of a longer text would be another program.
    names = dict.fromkeys(name for text in agree_text(own.ljust(PART_NAMES_CHARS)) for name in json.loads(text))
    found = {}
    for name in dict.fromkeys((*runner.names, *names)):
        values = np.zeros(rows)
        values[mine] = [parts.get(name, np.nan) for parts in scored.parts]
        found[name] = _owners(values)
    return found


def _sample(session: Session, host: Any, row: Row, i: int) -> Sample:
    prompt = host.tokens[i][host.valid[i] & ~host.loss_mask[i]]
    completion = host.tokens[i][host.loss_mask[i]]
    return Sample(
        prompt=session.tokenizer.decode(prompt),
        completion=session.tokenizer.decode(completion),
        messages=row.get("messages"),
        token_ids=completion.tolist(),
        finished=bool(host.finish_reason[i] == FINISH_END),
        group_id=int(host.group_id[i]),
        row=row,
    )


def row_metrics(rounds: Sequence[Completions], group_size: int) -> dict[str, float]:
    """What a step's completions look like, whatever the algorithm: all of them, kept by dynamic sampling or not."""

    def joined(column: Callable[[Completions], np.ndarray]) -> np.ndarray:
        return np.concatenate([column(done) for done in rounds])

    rewards, lengths, correct = joined(lambda d: d.rewards), joined(lambda d: d.lengths), joined(lambda d: d.correct)
    nats = -sum(done.host.behavior_logprobs.sum() for done in rounds)
    steps = [done.lengths.max() for done in rounds]
    slots = sum(done.lengths.size * count for done, count in zip(rounds, steps, strict=True))
    metrics = {
        "train/reward": rewards.mean(),
        "train/reward_std": rewards.std(),
        "train/completion_length": lengths.mean(),
        "train/completion_length_max": lengths.max(),
        "train/truncated": 1 - joined(lambda d: d.finished).mean(),
        "train/perplexity": np.exp(nats / max(lengths.sum(), 1)),
        "train/reward_failures": sum(done.failures for done in rounds),
        "rollout/decode_steps": sum(steps),
        "rollout/occupied_slot_share": lengths.sum() / max(slots, 1),
    }
    for name in dict.fromkeys(name for done in rounds for name in done.parts):
        values = np.concatenate([done.part(name) for done in rounds])
        metrics[f"train/reward/{name}"] = values[~np.isnan(values)].mean()
    if (correct >= 0).all():
        right, groups = correct == 1, (correct == 1).reshape(-1, group_size)
        metrics["train/correct"] = right.mean()
        metrics["train/groups_all_right"] = groups.all(axis=1).mean()
        metrics["train/groups_all_wrong"] = (~groups).all(axis=1).mean()
        if right.any():
            metrics["train/completion_length_right"] = lengths[right].mean()
        if not right.all():
            metrics["train/completion_length_wrong"] = lengths[~right].mean()
    datasets = np.asarray([str(row.get("dataset", "")) for done in rounds for row in done.rows])
    for name in sorted(set(datasets.tolist()) - {""}):
        metrics[f"train/reward_by_dataset/{name}"] = rewards[datasets == name].mean()
    return {name: float(value) for name, value in metrics.items()}
