"""Scores on held-out prompts, with the sampler and rewards used in training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rljax.data.batches import DataPosition, PromptBatch, PromptSource, repeat_prompts
from rljax.metrics import MetricsWriter
from rljax.rewards.estimates import maj_at_k, pass_at_k, rerank_at_k, with_interval
from rljax.rewards.runner import RewardRunner
from rljax.rollouts import SHOWN_FAILURES, Completions, ModelReward, complete, sample_record
from rljax.sampler import make_generate
from rljax.session import EVAL_KEY, Session
from rljax.sharding import agree_text


@dataclass
class Evaluator:
    """One compiled sampler and one split's prompts, always in the same order with the same random numbers."""

    session: Session
    source: PromptSource
    runner: RewardRunner | None  # None: a reward model alone judges
    split: str

    def __post_init__(self) -> None:
        config, session = self.session.config, self.session
        sampling = replace(
            session.sampling(config),
            temperature=config.eval.temperature,
            greedy_samples=int(config.eval.greedy),
            top_k=0,
            top_p=1.0,
            min_p=0.0,
        )
        shards = max(session.train.data_shards, session.decode.data_shards)
        self._prompts_per_batch = -(-min(config.eval.prompts_per_batch, len(self.source)) // shards) * shards
        samples = config.eval.completions
        self._generate = make_generate(
            session.model,
            session.train,
            session.decode,
            sampling,
            dtype=session.dtype,
            refill=session.refill(config, self._prompts_per_batch * samples, samples),
            name="evaluation",
        )

    def run(
        self, params: Any, version: int, ranker: ModelReward | None = None
    ) -> tuple[dict[str, float], list[Completions]]:
        """Metrics of the split, and the completions behind them. Every process gets the same numbers.

        ``ranker`` is a reward model that picks among a prompt's samples: of weight 0, so that no score depends on it,
        where rewards judge.
        """
        settings = self.session.config.eval
        samples = settings.completions
        total = len(self.source)
        position = DataPosition()
        rewards, correct, lengths, finished, batches = [], [], [], [], []
        answers: list[list[str | None]] = []
        ranks = []
        for start in range(0, total, self._prompts_per_batch):
            count = min(self._prompts_per_batch, total - start)
            rows, prompts, position = self.source.take(position, count)
            prompts = repeat_prompts(_filled(prompts, self._prompts_per_batch, self.source.prompt_lengths[-1]), samples)
            rows = [row for row in rows for _ in range(samples)]
            rows += [{}] * (len(prompts.tokens) - len(rows))
            key = self.session.key(EVAL_KEY)
            done = complete(self.session, self._generate, params, prompts, rows, self.runner, key, version, ranker)
            batches.append(done)
            kept = slice(0, count * samples)
            rewards.append(done.rewards[kept].reshape(count, samples))
            correct.append(done.correct[kept].reshape(count, samples))
            lengths.append(done.lengths[kept])
            if settings.samples > 1:
                given = all_answers(done)
                answers += [given[i + settings.greedy : i + samples] for i in range(0, count * samples, samples)]
                ranks += [done.parts["model"][kept].reshape(count, samples)] if ranker is not None else []
            finished.append(done.finished[kept])
        metrics = all_metrics(np.concatenate(rewards), np.concatenate(correct), settings.greedy)
        of_samples = [np.concatenate(each)[:, int(settings.greedy) :] for each in (correct, ranks) if each]
        metrics |= choice_metrics(of_samples[0], answers, of_samples[1] if ranks else None)
        metrics |= {
            "completion_length": float(np.concatenate(lengths).mean()),
            "truncated": float(1 - np.concatenate(finished).mean()),
            "score_temperature": settings.score_temperature,
            "temperature": settings.temperature,
            "max_new_tokens": self.session.config.rollout.max_new_tokens,
            "seconds": sum(done.times.rollout + done.times.reward for done in batches),
        }
        return metrics, batches


def all_metrics(rewards: np.ndarray, correct: np.ndarray, greedy: bool) -> dict[str, float]:
    """``score_metrics``; where each problem's first completion is ``greedy``, the score is of those alone.

    The other completions then give pass@k and a score of their own, ``sampled_score``, with its interval.
    """
    if not greedy:
        return score_metrics(rewards, correct)
    sampled = score_metrics(rewards[:, 1:], correct[:, 1:])
    named = {f"sampled_{name}": sampled.pop(name) for name in ("score", "score_low", "score_high")}
    return {**sampled, **named, **score_metrics(rewards[:, :1], correct[:, :1]), "samples": sampled["samples"]}


def score_metrics(rewards: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """``score``: the share of right completions where every one is judged, else the mean reward; then pass@k too.

    ``rewards`` and ``correct`` are [problems, samples]; each has its 95 % interval, a bootstrap over problems.
    """
    judged = bool((correct >= 0).all())
    problems, samples = rewards.shape
    metrics = with_interval("score", (correct if judged else rewards).mean(axis=1))
    metrics |= {"n": problems, "samples": samples, "reward": float(rewards.mean())}
    powers = [2**i for i in range(1, samples.bit_length())]
    for k in sorted({*powers, samples} - {1}) if judged else ():
        metrics |= with_interval(f"pass_at_{k}", [pass_at_k(samples, int(c), k) for c in correct.sum(axis=1)])
    return metrics


def choice_metrics(correct: np.ndarray, answers: list[list[str | None]], ranks: np.ndarray | None) -> dict[str, float]:
    """One answer out of a problem's samples: by vote (maj@k, where samples state answers), by rank (rerank@k).

    ``correct`` and ``ranks`` are [problems, samples]. Over all samples; how ties count is said in ``maj_at_k``.
    """
    if not answers or (correct < 0).any():
        return {}
    metrics: dict[str, float] = {}
    k = correct.shape[1]
    if any(answer is not None for given in answers for answer in given):
        metrics |= with_interval(f"maj_at_{k}", [maj_at_k(*pair) for pair in zip(answers, correct == 1, strict=True)])
    if ranks is not None:
        metrics |= with_interval(
            f"rerank_at_{k}", [rerank_at_k(*pair) for pair in zip(ranks, correct == 1, strict=True)]
        )
    return metrics


def all_answers(done: Completions) -> list[str | None]:
    """What every row's reward took for its answer, from the process that owns the row; every process calls it."""
    found = {int(i): answer for text in agree_text(json.dumps(done.answers)) for i, answer in json.loads(text).items()}
    return [found.get(i) for i in range(len(done.rows))]


def _filled(prompts: PromptBatch, rows: int, width: int) -> PromptBatch:
    """Prompts of one fixed shape: widened on the left, filled up with rows that have no prompt and decode nothing."""
    missing = rows - len(prompts.tokens)
    left = width - prompts.tokens.shape[1]
    grow = ((0, missing), (left, 0))
    tokens, valid = (np.pad(x, grow) for x in prompts[:2])
    return PromptBatch(tokens, valid, *(np.pad(x, (0, missing)) for x in prompts[2:] if x is not None))


def show(batches: list[Completions], count: int) -> list[dict[str, Any]]:
    """The first ``count`` prompts of the split with what was written: the same ones at every evaluation."""
    shown: list[dict[str, Any]] = []
    for done in batches:
        first_samples = np.flatnonzero((done.host.sample_id == 0) & done.host.valid.any(axis=1))
        shown += sample_records(done, first_samples[: count - len(shown)].tolist())
    return shown


def sample_records(done: Completions, chosen: list[int]) -> list[dict[str, Any]]:
    """The chosen rows as lines of samples.jsonl, each from the process that owns it; every process calls it."""
    mine = {i: sample_record(done, i) for i in chosen if i in done.samples}
    records = {int(i): record for text in agree_text(json.dumps(mine)) for i, record in json.loads(text).items()}
    return [records[i] for i in chosen]


def report_failures(writer: MetricsWriter, step: int, batches: Sequence[Completions]) -> None:
    """Completions whose reward failed, with the reason, as lines of samples.jsonl; the first is said.

    Every process calls it, with the same numbers of failures.
    """
    count = sum(done.failures for done in batches)
    if not count:
        return
    texts = agree_text(json.dumps([record for done in batches for record in done.failed]))
    records = [record for text in texts for record in json.loads(text)][:SHOWN_FAILURES]
    writer.write_samples(step, "failed", records)
    name, reason = next(iter(records[0]["failures"].items()))
    writer.event(
        step,
        f"step {step}: the reward {name!r} failed on a completion of prompt {records[0]['prompt_id']} ({reason}); "
        f"{count} failed, see those of phase 'failed' in samples.jsonl",
    )
