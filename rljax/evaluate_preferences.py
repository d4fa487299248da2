"""Held-out comparisons: accuracy, margin, calibration and best-of-n of rewards."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from rljax.algos.base import Algorithm, Batch
from rljax.algos.pairs import on_rows
from rljax.compiles import named
from rljax.config import EvalConfig
from rljax.data.batches import DataPosition
from rljax.forward import Forward, head_needs, make_reward
from rljax.models.decoder import Params
from rljax.packing import cut_rows, join_rows
from rljax.rewards.estimates import best_of_n, with_interval
from rljax.rollouts import Completions
from rljax.sharding import gather, to_global

BINS = 10  # of the confidence, for the calibration error
TIE = 1e-5  # rewards this near are alike: sums of float32 log-probs round so
SAME_LENGTH = 0.1  # answers whose lengths differ by at most this share of the longer are matched in length
RESAMPLES = 1000
PerAnswer = Float[np.ndarray, "n k"]


class PreferenceEvaluator:
    """One split's comparisons and the program that gives every answer its reward; always in the same order.

    ``reference`` gives the reference's log-probs of a batch, where the algorithm reads them.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        forward: Forward,
        source: Any,
        rows: int,
        pieces: int,
        reference: Callable[[Any], Array] | None,
    ):
        self.algorithm, self.source, self.rows, self.reference = algorithm, source, rows, reference
        self.layout, self.tree = forward.layout, algorithm.trains[0]
        make = implicit_rewards if self.tree == "policy" else explicit_rewards
        self._rewards = make(algorithm, forward, pieces)

    def run(self, trees: dict[str, Params]) -> dict[str, float]:
        """Metrics of the split. Every process gets the same numbers."""
        found: dict[str, list[np.ndarray]] = {"rewards": []}
        position, units = DataPosition(), self.rows // self.source.unit
        for start in range(0, len(self.source), units):
            _, batch, position = self.source.take(position, units)
            host = batch._asdict()
            host.pop("row_id")
            placed = {name: to_global(array, self.layout.rows) for name, array in host.items()}
            if self.reference is not None:
                placed["ref_logprobs"] = self.reference(batch)
            kept = min(units, len(self.source) - start)
            rewards = gather(self._rewards(trees[self.tree], placed))
            host |= {"lengths": batch.loss_mask.sum(axis=1), "rewards": rewards}
            for name, array in host.items():
                by_unit = np.asarray(array).reshape(units, -1, *array.shape[1:])
                found.setdefault(name, []).append(by_unit[:kept])
        arrays = {name: np.concatenate(parts) for name, parts in found.items()}
        return self._metrics(arrays)

    def _metrics(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        rewards = arrays["rewards"].astype(np.float64)
        if self.algorithm.rows == "steps":
            return label_metrics(rewards[:, 0], arrays["labels"][:, 0], arrays["label_mask"][:, 0])
        if self.algorithm.rows == "labelled":
            return separation_metrics(np.round(rewards[:, 0] / TIE) * TIE, arrays["scores"][:, 0] > 0)
        better = better_answers(arrays["scores"], arrays["answer_valid"], by_place=self.algorithm.rows == "pairs")
        return comparison_metrics(rewards, arrays["lengths"].astype(np.float64), better)


def explicit_rewards(algorithm: Algorithm, forward: Forward, pieces: int) -> Callable[[Params, Batch], Array]:
    """A reward model's scores, [rows] at the last token of each or, for labelled prefixes, [rows, t]."""

    def piece(params: Params, rows: Batch) -> Array:
        scores = forward.scores(params, rows)
        if algorithm.rows == "steps":
            return scores
        at = rows["loss_mask"].shape[1] - 1 - rows["loss_mask"][:, ::-1].argmax(axis=1)
        return jax.vmap(lambda row, t: row[t])(scores, at)

    def rewards(params: Params, batch: Batch) -> Array:
        return join_rows(jax.lax.map(partial(piece, params), cut_rows(batch, pieces, forward.layout)), forward.layout)

    return jax.jit(named("evaluation", rewards))


def implicit_rewards(algorithm: Algorithm, forward: Forward, pieces: int) -> Callable[[Params, Batch], Array]:
    """What a preference loss takes as reward of each answer: its own terms, of each unit by itself."""

    def piece(policy: Params, rows: Batch) -> Any:
        return forward.outputs(policy, rows, 1, head_needs(algorithm))

    def rewards(policy: Params, batch: Batch) -> Array:
        outputs = join_rows(
            jax.lax.map(partial(piece, policy), cut_rows(batch, pieces, forward.layout)), forward.layout
        )
        rows = batch["tokens"].shape[0]
        numbered = {**batch, "current_logprobs": outputs.logprobs, "row": jnp.arange(rows)}
        _, prepared, _ = algorithm.prepare(algorithm.init(), numbered, jax.random.key(0))
        outputs = jax.tree.map(lambda x: x[prepared["row"]], outputs)  # it may have dropped some
        unit = algorithm.unit * prepared["row"].shape[0] // rows
        units = jax.tree.map(lambda x: x.reshape(-1, unit, *x.shape[1:]), (outputs, prepared))
        terms = jax.vmap(lambda o, b: {name: term.numerator for name, term in algorithm.loss(o, b).items()})(*units)
        if algorithm.rows == "labelled":
            return terms["reward_desirable"] + terms["reward_undesirable"]
        return on_rows(terms["reward_chosen"], terms["reward_rejected"])

    return jax.jit(named("evaluation", rewards))


def better_answers(scores: PerAnswer, valid: Bool[np.ndarray, "n k"], *, by_place: bool) -> Bool[np.ndarray, "n k k"]:
    """Where the first answer of a unit is preferred to the second: by its place in a pair, or by score."""
    both = valid[:, :, None] & valid[:, None, :]
    if by_place:
        return both & np.triu(np.ones((scores.shape[1],) * 2, bool), 1)
    return both & (scores[:, :, None] > scores[:, None, :])


def comparison_metrics(rewards: PerAnswer, lengths: PerAnswer, better: Bool[np.ndarray, "n k k"]) -> dict[str, float]:
    """Accuracy (a tie is half right) and margin with 95 % bootstrap intervals over units, calibration, length.

    ``ece`` is the expected calibration error of σ(|difference|) in ten bins. ``length_accuracy`` is that of preferring
    the longer answer; ``matched_accuracy`` is the model's where lengths differ by a tenth at most.
    """
    units = better.any(axis=(1, 2))
    rewards, lengths, better = rewards[units], lengths[units], better[units]
    gaps, longer = (x[:, :, None] - x[:, None, :] for x in (rewards, lengths))
    right = (np.sign(np.where(np.abs(gaps) <= TIE, 0, gaps)) + 1) / 2
    longest = np.maximum(lengths[:, :, None], lengths[:, None, :])
    matched = better & (np.abs(longer) <= SAME_LENGTH * longest)
    accuracies, margins = (_unit_means(x, better) for x in (right, gaps))
    metrics = {
        "n": len(rewards),
        "comparisons": int(better.sum()),
        **_with_interval("accuracy", accuracies),
        **_with_interval("margin", margins),
        "ece": calibration_error(np.abs(gaps[better]), right[better]),
        "length_accuracy": float(((np.sign(longer[better]) + 1) / 2).mean()),
        "matched_comparisons": int(matched.sum()),
    }
    if matched.any():
        metrics |= _with_interval("matched_accuracy", _unit_means(right, matched)[matched.any(axis=(1, 2))])
    return metrics | {name.replace("accuracy", "score"): metrics[name] for name in _INTERVAL}


_INTERVAL = ("accuracy", "accuracy_low", "accuracy_high")


def label_metrics(
    logits: Float[np.ndarray, "n t"], labels: Float[np.ndarray, "n t"], mask: Bool[np.ndarray, "n t"]
) -> dict[str, float]:
    """Of labelled prefixes: accuracy with its interval over rows, calibration, area under the ROC curve."""
    right = ((logits > 0) == (labels > 0.5)).astype(np.float64)
    shares = (right * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    metrics = {
        "n": len(logits),
        "comparisons": int(mask.sum()),
        **_with_interval("accuracy", shares[mask.any(axis=1)]),
        "ece": calibration_error(np.abs(logits[mask]), right[mask]),
    }
    positive = labels[mask] > 0.5
    if positive.any() and not positive.all():
        metrics["auc"] = area_under_curve(logits[mask], positive)
    return metrics | {name.replace("accuracy", "score"): metrics[name] for name in _INTERVAL}


def separation_metrics(rewards: Float[np.ndarray, " n"], desirable: Bool[np.ndarray, " n"]) -> dict[str, float]:
    """Of labelled answers: the share of (desirable, undesirable) pairs in the right order, its interval over rows."""
    rng, rows = np.random.default_rng(0), np.arange(len(rewards))
    draws = (rng.choice(rows, len(rows)) for _ in range(RESAMPLES))
    resampled = [area_under_curve(rewards[d], desirable[d]) for d in draws if 0 < desirable[d].sum() < len(d)]
    both = bool(desirable.any() and not desirable.all())
    score = area_under_curve(rewards, desirable) if both else float("nan")
    low, high = np.quantile(resampled, [0.025, 0.975]) if both else (score, score)
    interval = dict(zip(_INTERVAL, (score, float(low), float(high)), strict=True))
    gap = float(rewards[desirable].mean() - rewards[~desirable].mean()) if both else float("nan")
    return {
        "n": len(rewards),
        **interval,
        "margin": gap,
        **{name.replace("accuracy", "score"): value for name, value in interval.items()},
    }


def area_under_curve(values: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Chance that a positive stands above a negative, ties half: Mann-Whitney's U over the number of pairs."""
    _, level_of, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[level_of]
    count, rest = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * rest))


def calibration_error(logits: Float[np.ndarray, " n"], right: Float[np.ndarray, " n"]) -> float:
    """Expected calibration error of the confidence σ(logit), logit >= 0: bins of equal width from 1/2 to 1."""
    confidence = 1 / (1 + np.exp(-logits))
    which = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right - confidence)[which == b].sum())) for b in range(BINS)]
    return sum(gaps) / len(logits)


def _with_interval(name: str, values: np.ndarray) -> dict[str, float]:
    return with_interval(name, values, resamples=RESAMPLES)


def _unit_means(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (values * mask).sum(axis=(1, 2)) / np.maximum(mask.sum(axis=(1, 2)), 1)


class BestOfN:
    """Completions drawn once, of which a reward model picks; the rewards they were given count as the truth."""

    def __init__(self, forward: Forward, batches: list[Completions], settings: EvalConfig):
        self.batches, self.settings = batches, settings
        self._rewards = make_reward(forward, 1, name="evaluation")

    def run(self, reward_model: Params) -> dict[str, float]:
        """``best_of_{k}``: expected true reward of the best-scored of k, with its interval over prompts.

        ``sample_accuracy``: share of a prompt's pairs of unequal truth that the scores order alike, mean over prompts.
        """
        picked, truths = [], []
        for done in self.batches:
            r = done.rollout
            scores = gather(self._rewards(reward_model, {"tokens": r.tokens, "valid": r.valid}))
            truth = done.rewards if (done.correct < 0).any() else done.correct
            there = done.host.valid.any(axis=1)
            shape, first = (-1, self.settings.completions), int(self.settings.greedy)  # samples stand behind it
            picked.append(scores[there].reshape(shape)[:, first:])
            truths.append(np.asarray(truth, np.float64)[there].reshape(shape)[:, first:])
        scores, truth = np.concatenate(picked), np.concatenate(truths)
        better = better_answers(truth, np.ones(truth.shape, bool), by_place=False)
        mixed = better.any(axis=(1, 2))
        right = (np.sign(scores[:, :, None] - scores[:, None, :]) + 1) / 2
        metrics: dict[str, float] = {"sample_prompts": int(mixed.sum())}
        if mixed.any():
            found = _with_interval("sample_accuracy", _unit_means(right, better)[mixed])
            metrics |= found | {name.replace("sample_accuracy", "score"): value for name, value in found.items()}
        n = 1
        while n <= self.settings.samples:
            values = [best_of_n(s, n, t) for s, t in zip(scores, truth, strict=True)]
            metrics |= _with_interval(f"best_of_{n}", np.asarray(values))
            n *= 2
        return metrics
