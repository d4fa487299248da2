"""From prompts to scored completions: rollout on the devices, text and rewards on the hosts."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from rljax.data.batches import PromptBatch
from rljax.data.tokenizer import Tokenizer
from rljax.pieces import Times, Writer, Written, cut_pieces, joined, overlapped, write
from rljax.rewards.base import Sample, Span
from rljax.rewards.runner import RewardRunner, Scored, join_scored
from rljax.sampler import Generate
from rljax.session import Session
from rljax.sharding import agree, agree_text, gather, owned_rows, to_global
from rljax.types import FINISH_END, Prompts, Rollout

Row = dict[str, Any]

# Room for the names of rewards' parts where processes exchange them.
PART_NAMES_CHARS = 4000

# Of a call, on a process, and of a step: failed completions that are kept to be read.
SHOWN_FAILURES = 8


class Completions(NamedTuple):
    """The completions of a step, on the devices and on every host, with what the rewards said."""

    rollout: Rollout  # global arrays in the training layout
    host: Any  # the same Rollout as NumPy arrays
    rows: list[Row]
    rewards: np.ndarray  # [b]
    correct: np.ndarray  # [b] 1 right, 0 wrong, -1 nobody judges
    parts: dict[str, np.ndarray]  # each reward's own value, and its parts as name/part, nan where it has none; [b]
    dense: np.ndarray | None  # [b, t] what rewards gave to single tokens; None where none did
    failures: int  # rows, on all processes, that a reward gave no number for
    failed: list[dict[str, Any]]  # the first of them on this process, as ``sample_record`` with the reasons
    samples: dict[int, Sample]  # this process's rows by number
    answers: dict[int, str | None]
    times: Times

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
    """A reward model on the devices: ``scores(rollout) -> [b]``, and what the rewards take of it."""

    scores: Callable[[Rollout], Any]
    weight: float
    threshold: float | None = None  # of ``verified_bonus``, in place of the weighted score


def verified_bonus(verified: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """What a reward model adds to a verifier's value V: 1 where V > 0 and its score is above the threshold, else -.5.

    Where V is not above 0 it adds nothing (IF-RLVR, 2507.02833, section 5).
    """
    return np.where(verified > 0, np.where(scores > threshold, 1.0, -0.5), 0.0)


class Rival(NamedTuple):
    """Who writes the second half of every prompt's completions in the policy's place."""

    generate: Generate
    params: Any
    group_size: int  # completions of a prompt, whoever writes them


def rival_rows(rows: int, group_size: int) -> np.ndarray:
    """Which of a prompt's completions a rival writes: the second half, the smaller one of an odd number."""
    return np.arange(rows) % group_size > (group_size - 1) // 2


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
    rival: Rival | None = None,
    pieces: int = 1,
) -> Completions:
    """Complete every prompt and score what was written. ``prompts`` and ``rows`` are whole on every process.

    In ``pieces`` the rewards of one overlap with the sampling of the next; the completions are the same.
    """
    layout = session.train.rows
    owned = owned_rows(layout, len(rows), jax.process_index())
    theirs = np.zeros(len(rows), bool) if rival is None else rival_rows(len(rows), rival.group_size)
    writers = [Writer(generate, params, ~theirs)]
    writers += [] if rival is None else [Writer(rival.generate, rival.params, theirs)]
    written, reads, times = overlapped(
        partial(write, writers, Prompts._make(prompts), key, jnp.int32(version), layout),
        partial(_read, session, rows, owned, runner),
        cut_pieces(len(rows), pieces, max(session.train.data_shards, session.decode.data_shards)),
    )
    rollout, host = joined(written, layout)
    values, parts, answers, dense, reasons = _judged(session, host, runner, reads)
    if session.config.reward.discard_failed and values[2].any():
        host = host._replace(loss_mask=host.loss_mask & (values[2] == 0)[:, None])
        rollout = rollout._replace(loss_mask=to_global(host.loss_mask, layout))
    if model_reward is not None:
        parts["model"] = gather(model_reward.scores(rollout)).astype(float)
        if model_reward.threshold is None:
            values[0] += model_reward.weight * parts["model"]
        else:
            values[0] += model_reward.weight * verified_bonus(values[0], parts["model"], model_reward.threshold)
    done = Completions(
        rollout=rollout,
        host=host,
        rows=list(rows),
        rewards=values[0],
        correct=values[1].astype(int),
        parts=parts,
        dense=dense,
        failures=int(values[2].sum()),
        failed=[],
        samples=dict(sorted((i, sample) for read in reads for i, sample in read.samples.items())),
        answers=answers,
        times=times,
    )
    shown = list(reasons)[:SHOWN_FAILURES]
    return done._replace(failed=[{**sample_record(done, i), "failures": reasons[i]} for i in shown])


def sample_record(done: Completions, i: int) -> dict[str, Any]:
    """One of this process's completions as a line of samples.jsonl."""
    sample = done.samples[i]
    return {
        "prompt_id": int(done.host.prompt_id[i]),
        "sample_id": int(done.host.sample_id[i]),
        "prompt": sample.prompt,
        "completion": sample.completion,
        "finished": sample.finished,
        "reward": float(done.rewards[i]),
        "correct": None if done.correct[i] < 0 else bool(done.correct[i]),
        "answer": done.answers[i],
        "parts": {name: float(values[i]) for name, values in done.parts.items() if not np.isnan(values[i])},
        "token_ids": list(sample.token_ids),
    }


class _Read(NamedTuple):
    """What this process made of a piece: its rows by number, and what the rewards say of them in that order."""

    samples: dict[int, Sample]
    scored: Scored | None


def _read(
    session: Session, rows: Sequence[Row], owned: np.ndarray, runner: RewardRunner | None, written: list[Written]
) -> _Read:
    found = {
        int(i): _sample(session, rows[i], jax.tree.map(lambda x, k=k: x[k], each.host))
        for each in written
        for k, i in enumerate(each.rows)
        if owned[i] and each.host.valid[k].any()
    }
    samples = dict(sorted(found.items()))
    return _Read(samples, None if runner is None else runner.score(list(samples.values())))


class _Judged(NamedTuple):
    """What the rewards say of a step's rows, agreed by all processes; ``answers`` of this process's rows."""

    values: np.ndarray  # [3, b]: the reward, ``correct``, 1 where a reward failed
    parts: dict[str, np.ndarray]
    answers: dict[int, str | None]
    dense: np.ndarray | None
    reasons: dict[int, dict[str, str]]  # of this process's failures: row, reward, why


def _judged(session: Session, host: Any, runner: RewardRunner | None, reads: Sequence[_Read]) -> _Judged:
    numbers = [i for read in reads for i in read.samples]
    mine, values = np.asarray(numbers, int), np.zeros((3, len(host.tokens)))
    values[1, mine] = -1
    parts: dict[str, np.ndarray] = {}
    answers: dict[int, str | None] = dict.fromkeys(numbers)
    spans: dict[int, tuple[Span, ...]] = {}
    reasons: dict[int, dict[str, str]] = {}
    if runner is not None:
        scored = join_scored([read.scored for read in reads if read.scored is not None])
        values[0, mine] = scored.values
        values[1, mine] = [-1 if c is None else int(c) for c in scored.correct]
        for failure in scored.failures:
            reasons.setdefault(numbers[failure.index], {})[failure.reward] = failure.reason
        values[2, list(reasons)] = 1
        parts = _parts(runner, scored, mine, len(host.tokens))
        answers = dict(zip(numbers, scored.answers, strict=True))
        spans = dict(zip(numbers, scored.spans, strict=True))
    dense = _dense_rewards(session, host, spans)
    return _Judged(_owners(values), parts, answers, dense, reasons)


def _dense_rewards(session: Session, host: Any, spans: dict[int, tuple[Span, ...]]) -> np.ndarray | None:
    """``Score.spans`` of this process's rows as a number a token, agreed; None where no process has any."""
    if not agree(np.asarray(any(spans.values())), np.any):
        return None
    dense = np.zeros(host.tokens.shape)
    for i, of_row in spans.items():
        dense[i, host.loss_mask[i]] = rewards_of_spans(session.tokenizer, host.tokens[i][host.loss_mask[i]], of_row)
    return _owners(dense)


def rewards_of_spans(tokenizer: Tokenizer, ids: Sequence[int], spans: Sequence[Span]) -> np.ndarray:
    """Each span's value on the token that has its last character, so they sum to the spans' values (ARES, 2407.00087).

    A span behind the text, or an empty one, counts on the last token.
    """
    rewards = np.zeros(len(ids))
    if not spans:
        return rewards
    ends = [len(tokenizer.decode(ids[: k + 1])) for k in range(len(ids))]
    for span in spans:
        reached = [k for k, end in enumerate(ends) if end >= span.end > span.start]
        rewards[reached[0] if reached else -1] += span.value
    return rewards


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


def _sample(session: Session, row: Row, written: Any) -> Sample:
    """One row of a rollout as text."""
    prompt = written.tokens[written.valid & ~written.loss_mask]
    completion = written.tokens[written.loss_mask]
    return Sample(
        prompt=session.tokenizer.decode(prompt),
        completion=session.tokenizer.decode(completion),
        messages=row.get("messages"),
        token_ids=completion.tolist(),
        finished=bool(written.finish_reason == FINISH_END),
        group_id=int(written.group_id),
        row=row,
    )
