"""What RL did to the text: KL, likelihood under the untouched model, diversity, win rate, best-of-n.

python -m rljax.drift --config configs/tinystories_grpo.py --model=runs/tinystories_grpo/model

Several folders, ``--model=A --model=B``, are compared with the same start: a frontier of reward and KL. ``--split=dev``
takes that split's prompts and not test's: whoever chose settings by one of them reports the other. To judge by a reward
model too, name its folder: ``--config.reward_model_from=FOLDER``.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from rljax.config import parse
from rljax.data.batches import DataPosition, PromptSource, repeat_prompts
from rljax.forward import make_reward, make_score
from rljax.main import USER_ERROR
from rljax.models.decoder import Params
from rljax.models.hf_import import find_params, load_params
from rljax.rewards.estimates import best_of_n, bootstrap_interval, win_rates, with_interval
from rljax.rewards.runner import RewardRunner
from rljax.rewards.text import distinct_n
from rljax.rollouts import Completions, ModelReward, complete
from rljax.sampler import make_generate
from rljax.session import EVAL_KEY, Session, open_session, start_devices
from rljax.setup import make_runner, split_rows
from rljax.sharding import gather
from rljax.types import Rollout

Report = dict[str, Any]

BEST_OF = (1, 2, 4, 8, 16)
PROMPTS, SAMPLES = 64, 16
# When a reward that rose counts: the text is still the start's own kind, and it beats picking the best of four.
BOUNDS: dict[str, Callable[[Report, Report], bool]] = {
    "kl_per_completion": lambda start, policy: policy["kl_per_completion"] <= 8,
    "nll": lambda start, policy: policy["nll"] <= start["nll"] + 0.3,
    "distinct_4": lambda start, policy: abs(policy["distinct_4"] - start["distinct_4"]) <= 0.2 * start["distinct_4"],
    "length": lambda start, policy: abs(policy["length"] - start["length"]) <= 0.2 * start["length"],
    "reward": lambda start, policy: policy["reward"] >= start["best_of"]["4"],
}


def measure_drift(
    session: Session, folders: Sequence[str], source: PromptSource, runner: RewardRunner | None
) -> Report:
    """The config's own start and the policies in ``folders`` complete the same prompts, SAMPLES times each.

    ``kl_per_completion``: mean over the policy's completions of log policy - log base, nats. ``nll``: of completions
    under the untouched base, nats a token. ``win_rate``: chance that a completion has a higher reward than one of the
    base for the same prompt, with its interval; ``win_rate_model`` by the reward model alone. ``best_of``: the base's
    expected best reward of n samples. ``holds``: which BOUNDS a policy keeps. Sampled as in training.
    """
    sampling = session.sampling(session.config)
    count = min(PROMPTS, len(source)) // session.train.data_shards * session.train.data_shards
    rows, prompts, _ = source.take(DataPosition(), count)
    prompts = repeat_prompts(prompts, SAMPLES)
    refill = session.refill(session.config, count * SAMPLES, SAMPLES)
    generate = make_generate(session.model, session.train, session.decode, sampling, dtype=session.dtype, refill=refill)
    rows = [row for row in rows for _ in range(SAMPLES)]
    score = make_score(session.forward(sampling), prompts.tokens.shape[1], SAMPLES)
    base, judge = session.base_params(), _reward_model(session)

    def described(policy: Params) -> Report:
        done = complete(session, generate, policy, prompts, rows, runner, session.key(EVAL_KEY), 0, judge)
        r = done.rollout
        under_base = gather(score(base, {"tokens": r.tokens, "valid": r.valid, "support": r.support}))
        return _describe(done, under_base, count)

    start = described(base)
    scores = start.pop("scores")
    start["best_of"] = {str(n): float(np.mean([best_of_n(row, n) for row in scores["win_rate"]])) for n in BEST_OF}
    report = {"prompts": count, "samples": SAMPLES, "temperature": sampling.temperature, "base": start}
    for folder in folders:
        policy = described(load_params(folder, session.model, session.train, dtype=session.param_dtype))
        for name, values in policy.pop("scores").items():
            policy |= with_interval(name, win_rates(values, scores[name]))
        report[folder] = policy | {"holds": {name: bool(holds(start, policy)) for name, holds in BOUNDS.items()}}
    return report


def _check_reward_model(session: Session) -> None:
    """That the folder of ``reward_model_from`` holds one. Raises ValueError."""
    source = session.config.reward_model_from
    if source in session.config.recipe:
        raise ValueError(
            f"config.reward_model_from is the stage {source!r}; name the folder that it was exported to, such as "
            f"{session.folder / 'reward_model'}"
        )
    if source:
        find_params(source, session.scalar_model(source))


def _reward_model(session: Session) -> ModelReward | None:
    """As training uses it; None where the config names none."""
    config = session.config
    if not config.reward_model_from:
        return None
    model = session.scalar_model(config.reward_model_from)
    params = load_params(config.reward_model_from, model, session.train, dtype=session.dtype)
    reward = make_reward(session.forward(None, model), SAMPLES)

    def scores(rollout: Rollout) -> Any:
        return reward(params, {"tokens": rollout.tokens, "valid": rollout.valid})

    return ModelReward(scores, config.reward_model_weight, config.reward_model_threshold)


def _describe(done: Completions, under_base: np.ndarray, prompts: int) -> Report:
    mask = done.host.loss_mask
    base_sums = np.where(mask, under_base, 0).sum(axis=1)
    gaps = done.host.behavior_logprobs.sum(axis=1) - base_sums
    interval = bootstrap_interval(done.rewards.reshape(prompts, -1).mean(axis=1))
    scores = {"win_rate": done.rewards}
    if "model" in done.parts:
        scores["win_rate_model"] = done.parts["model"]
    return {
        "scores": {name: values.reshape(prompts, -1) for name, values in scores.items()},
        "reward": float(done.rewards.mean()),
        "reward_interval": list(interval),
        "parts": {name: float(np.nanmean(values)) for name, values in done.parts.items()},
        "kl_per_completion": float(gaps.mean()),
        "nll": float(-base_sums.sum() / mask.sum()),
        "distinct_4": distinct_n([sample.completion for sample in done.samples.values()], 4),
        "length": float(done.lengths.mean()),
        "finished": float(done.finished.mean()),
        "shown": [done.samples[i].prompt + done.samples[i].completion for i in range(0, 3 * SAMPLES, SAMPLES)],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report of trained model folders against the config's own start, as JSON."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(arguments):
        print(__doc__, end="")
        return 0
    folders, splits = (
        [t.partition("=")[2] for t in arguments if t.startswith(key)] for key in ("--model=", "--split=")
    )
    split = splits[-1] if splits else "test"
    try:
        if split not in ("dev", "test"):
            raise ValueError(f"--split={split}: held-out prompts are those of dev or of test")
        if not folders:
            raise ValueError("give the trained policy's folder as --model=runs/NAME/model")
        config = parse([text for text in arguments if not text.startswith(("--model=", "--split="))]).config
        start_devices(config)
        session = open_session(config)
        for folder in folders:
            find_params(folder, session.model)
        rows = split_rows(config.data, split)
        source = PromptSource(rows, session.tokenizer, config.data.prompt_lengths, config.data.seed, shuffle=False)
        if not (config.reward.names or config.reward_model_from):
            raise ValueError("config.reward.names and reward_model_from are empty; drift compares rewards as well")
        _check_reward_model(session)
        runner = make_runner(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    with runner or nullcontext():
        print(json.dumps(measure_drift(session, folders, source, runner), indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
