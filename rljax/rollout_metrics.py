"""What the completions of a step look like, in numbers."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rljax.rollouts import Completions, rival_rows


def decode_counts(done: Completions) -> tuple[int, int]:
    """Steps of the longest data shard, and slots times steps over all; of a fixed batch where nobody counted."""
    host = done.host
    if host.decode_steps is None:
        return int(done.lengths.max()), int(done.lengths.max() * done.lengths.size)
    return int(host.decode_steps.max()), round(float(host.slot_steps.sum(dtype=np.float64)))


def row_metrics(rounds: Sequence[Completions], group_size: int, rivals: bool = False) -> dict[str, float]:
    """What a step's completions look like, whatever the algorithm: all of them, kept by dynamic sampling or not.

    Where ``rivals`` wrote some of them everything is said of the policy's own, but for their reward, failures and the
    decode loop.
    """
    rows = sum(len(done.rows) for done in rounds)
    own = ~rival_rows(rows, group_size) if rivals else np.ones(rows, bool)

    def joined(column: Callable[[Completions], np.ndarray]) -> np.ndarray:
        return np.concatenate([column(done) for done in rounds])

    all_rewards, all_lengths = joined(lambda d: d.rewards), joined(lambda d: d.lengths)
    rewards, lengths, correct = all_rewards[own], all_lengths[own], joined(lambda d: d.correct)[own]
    nats = -joined(lambda d: np.where(d.host.loss_mask, d.host.behavior_logprobs, 0).sum(axis=1))[own].sum()
    steps, slot_steps = zip(*map(decode_counts, rounds), strict=True)
    metrics = {
        "train/reward": rewards.mean(),
        "train/reward_std": rewards.std(),
        "train/completion_length": lengths.mean(),
        "train/completion_length_max": lengths.max(),
        "train/truncated": 1 - joined(lambda d: d.finished)[own].mean(),
        "train/perplexity": np.exp(nats / max(lengths.sum(), 1)),
        "train/reward_failures": sum(done.failures for done in rounds),
        "rollout/decode_steps": sum(steps),
        "rollout/occupied_slot_share": all_lengths.sum() / max(sum(slot_steps), 1),
    }
    if rivals:
        metrics["train/reward_rival"] = all_rewards[~own].mean()
    part_names = dict.fromkeys(name for done in rounds for name in done.parts)
    parts = {name: np.concatenate([done.part(name) for done in rounds])[own] for name in part_names}
    metrics |= _part_means("train/reward", parts)
    if (correct >= 0).all():
        metrics |= _verdict_metrics(correct == 1, lengths, int(own[:group_size].sum()))
    datasets = np.asarray([str(row.get("dataset", "")) for done in rounds for row in done.rows])[own]
    for name in sorted(set(datasets.tolist()) - {""}):
        here = datasets == name
        metrics[f"train/reward_by_dataset/{name}"] = rewards[here].mean()
        metrics[f"train/reward_std_by_dataset/{name}"] = rewards[here].std()
        of_parts = {part: values[here] for part, values in parts.items()}
        metrics |= _part_means(f"train/reward_by_dataset/{name}", of_parts)
    return {name: float(value) for name, value in metrics.items()}


def _part_means(prefix: str, parts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each part over the rows that have it."""
    return {f"{prefix}/{name}": np.nanmean(v) for name, v in parts.items() if not np.isnan(v).all()}


def _verdict_metrics(right: np.ndarray, lengths: np.ndarray, group_size: int) -> dict[str, float]:
    groups = right.reshape(-1, group_size)
    metrics = {
        "train/correct": right.mean(),
        "train/groups_all_right": groups.all(axis=1).mean(),
        "train/groups_all_wrong": (~groups).all(axis=1).mean(),
    }
    if right.any():
        metrics["train/completion_length_right"] = lengths[right].mean()
    if not right.all():
        metrics["train/completion_length_wrong"] = lengths[~right].mean()
    return metrics
