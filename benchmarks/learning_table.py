"""Does each method learn? One chain on the common small task, equal samples, three seeds, a table with intervals.

    make learning-table        (or: python -m benchmarks.learning_table --seeds=0 --methods="grpo;lite_ppo")

A seed: the quickstart's supervised warm start; its samples, judged by the verifier, as pairs (a right answer against a
wrong one); a reward model on those pairs; then every method from the same policy on the same budget of samples (that of
the pairs, for those which learn from pairs). Scores
are greedy exact match on held-out problems. An improvement is a paired difference to the start whose 95 % interval
(bootstrap over problems and seeds) lies above 0. Controls: rewards permuted, learning rate 0, rewards negated.
"""

import argparse
import contextlib
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs.quickstart import get_config as quickstart
from rljax.config import make_config
from rljax.config.build import algo_defaults
from rljax.data.batches import DataPosition, PromptSource, repeat_prompts
from rljax.drift import measure_drift
from rljax.rewards.estimates import bootstrap_interval, paired_difference
from rljax.rollouts import complete
from rljax.run import finish, open_training
from rljax.sampler import make_generate
from rljax.session import ROLLOUT_KEY, Session, open_session, start_devices
from rljax.setup import make_runner, split_rows
from rljax.trainer import train

PROMPTS, GROUP = 32, 8  # of a rollout
STEPS = 40  # rollouts: every method sees 40 x 256 samples
SFT_STEPS = 900


@dataclass(frozen=True)
class Method:
    """One row of the table: settings over the common ones.

    ``rises`` says what is expected of it: 1, 0 (a control) or -1.
    """

    algo: str
    settings: dict[str, Any] = field(default_factory=dict)  # of the algorithm
    config: dict[str, Any] = field(default_factory=dict)  # flattened keys over the common config; @ is a place
    stages: dict[str, Any] = field(default_factory=dict)  # a recipe of its own, whose last stage is what is trained
    rises: int = 1


GRPO = {
    "kl_coef": 0.0,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "advantage_mean": "group",
    "advantage_std": "batch",
    "aggregation": "token_mean",
}
FOUR_EPOCHS = {"batch.epochs": 4, "batch.minibatches": 1}
ON_PAIRS = {"data.train": "@pairs", "data.train_rows": 0, "steps": 160, "optim.learning_rate": 1e-4}
ON_PAIRS |= {"batch.rows": 32, "batch.micro_batch_rows": 8}
PPO = {
    "kl_coef": 0.0,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "aggregation": "token_mean",
    "gamma": 1.0,
    "lam": 0.95,
    "value_coef": 1.0,
    "value_clip": 0.2,
    "whiten_advantages": "rollout",
}
FROM_REWARD_MODEL = {"critic.init_from": "@reward_model", "critic.optim.learning_rate": 1e-3}


def one_round(rule: dict[str, Any], learn: dict[str, Any], rounds: int = 1) -> dict[str, Any]:
    """Rounds of sampling, each followed by learning from what all of them sampled, from the start."""
    stages: dict[str, Any] = {}
    for number in range(1, rounds + 1):
        sampled = ",".join(f"sample_{earlier}" for earlier in range(1, number + 1))
        stages[f"sample_{number}"] = {
            "algo": {"name": "collect"},
            "steps": STEPS // rounds,
            "data": {"seed": number},
            "batch": {"rows": 0, "micro_batch_rows": 0},
        }
        stages[f"learn_{number}"] = {
            **learn,
            "init_from": "base",
            "data": {"train": f"rollouts:{sampled}", "train_rows": 0},
            "select": rule,
        }
    return stages


METHODS: dict[str, Method] = {
    "grpo": Method(
        "grpo", {**GRPO, "advantage_std": "group", "clip_high": 0.2, "aggregation": "sequence_mean_token_mean"}
    ),
    "lite_ppo": Method("grpo", {**GRPO, "clip_high": 0.2}),
    "dapo": Method(
        "grpo", {**GRPO, "advantage_std": "group"}, {"rollout.keep_groups": "mixed", "rollout.max_rounds": 2}
    ),
    "dr_grpo": Method("grpo", {**GRPO, "advantage_std": "none", "aggregation": "constant_length"}),
    "gspo": Method(
        "grpo",
        {
            **GRPO,
            "surrogate": "gspo",
            "advantage_std": "group",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "aggregation": "sequence_mean_token_mean",
        },
        FOUR_EPOCHS,
    ),
    "grpo, 4 epochs": Method("grpo", GRPO, FOUR_EPOCHS),
    "rloo": Method(
        "rloo",
        {
            "kl_coef": 0.0,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "surrogate": "reinforce",
            "aggregation": "sequence_mean_token_sum",
        },
    ),
    "reinforce++": Method(
        "reinforce",
        {
            "kl_coef": 0.0,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "token_mean",
            "gamma": 1.0,
            "baseline": "group",
            "whiten_advantages": True,
        },
    ),
    "ppo": Method("ppo", PPO, FROM_REWARD_MODEL),
    "ppo, 4 epochs": Method("ppo", PPO, {**FROM_REWARD_MODEL, **FOUR_EPOCHS}),
    "dpo": Method("dpo", {"beta": 0.1}, ON_PAIRS),
    "ipo": Method("dpo", {"beta": 0.1, "loss": "ipo_sum"}, ON_PAIRS),
    "simpo": Method("simpo", {"beta": 2.0, "gamma": 1.0}, ON_PAIRS),
    "orpo": Method("orpo", {"odds_coef": 1.0}, ON_PAIRS),
    "kto": Method(
        "sft",
        stages=one_round(
            {"rule": "verdicts", "distinct": "text"},
            {
                "algo": {"name": "kto", "beta": 0.1},
                "steps": 160,
                "batch": {"rows": 64, "micro_batch_rows": 16},
                "optim": {"learning_rate": 1e-4},
            },
        ),
    ),
    "online dpo": Method(
        "online_dpo",
        {"beta": 0.1},
        {"optim.learning_rate": 1e-4, "batch.epochs": 2, "batch.minibatches": 2, "batch.micro_batch_rows": 16},
    ),
    "expert iteration": Method(
        "sft",
        stages=one_round(
            {"rule": "correct", "distinct": "text"},
            {
                "algo": {"name": "sft"},
                "steps": 150,
                "batch": {"rows": 64, "micro_batch_rows": 16},
                "optim": {"learning_rate": 1e-3, "schedule": "cosine"},
            },
            rounds=2,
        ),
    ),
    "rto": Method("rto", {**PPO, "guide_coef": 0.05, "guide_clamp": 0.05}, {**FROM_REWARD_MODEL, "guide_from": "@dpo"}),
    "permuted rewards": Method("grpo", GRPO, {"reward.permute": True}, rises=0),
    "learning rate 0": Method("grpo", GRPO, {"optim.learning_rate": 0.0, "optim.warmup_steps": 0}, rises=0),
    "negated rewards": Method("grpo", GRPO, {"reward.weights": (-1.0,)}, rises=-1),
}


REWARD_MODEL = Method("reward_model", {"loss": "bradley_terry"}, {**ON_PAIRS, "optim.learning_rate": 3e-4})


def common(seed: int, name: str, folder: Path) -> Any:
    """The quickstart's task and model."""
    config = quickstart()
    config.seed = config.data.seed = config.model.init_seed = seed
    config.name = name
    config.output_dir = str(folder / name)
    config.checkpoint.keep = 1
    config.checkpoint.every_steps = 0
    config.log.samples_per_step = 0
    return config


def method_config(method: Method, seed: int, name: str, folder: Path) -> Any:
    """``method`` from the warm start of its seed."""
    config = common(seed, name, folder)
    config.recipe = ("main",)
    with config.unlocked():
        config.stages = {}
        config.model.architecture = {}
        config.algo = algo_defaults(method.algo)
        config.algo.update(method.settings)
    config.model.path = str(folder / f"sft-{seed}" / "model")
    config.steps = STEPS
    config.optim.schedule = "constant"
    config.optim.warmup_steps = min(config.optim.warmup_steps, STEPS // 8)
    config.data.dev = ""
    config.data.dev_rows = 0
    config.rollout.prompts_per_step, config.rollout.group_size = PROMPTS, GROUP
    if method.stages:
        config.recipe = tuple(method.stages)
        with config.unlocked():
            config.stages = ConfigDict(method.stages)
    places = {
        "pairs": folder / f"pairs-{seed}.jsonl",
        "reward_model": folder / f"reward_model-{seed}" / "reward_model",
        "dpo": folder / f"dpo-{seed}" / "model",
    }
    given = {
        key: str(places[value[1:]]) if str(value).startswith("@") else value for key, value in method.config.items()
    }
    config.update_from_flattened_dict(given)
    return config


def run(config: Any) -> tuple[np.ndarray, dict[str, float]]:
    """Trains; greedy right or wrong of every held-out problem, and the last step's metrics."""
    session = open_session(make_config(config))
    with (
        contextlib.redirect_stdout(io.StringIO()),
        open_training(session, command=["benchmarks.learning_table"]) as opened,
    ):
        train(opened)
        finish(opened)
        evaluator = opened.evaluators.get("test")
        if evaluator is None or opened.trees is None or "policy" not in opened.trees:
            return np.zeros(0), _last(session)
        batches = evaluator.run(opened.trees["policy"], 0)[1]
    rows = [row for done in batches for row in done.correct[done.host.valid.any(axis=1)]]
    return np.asarray(rows, float), _last(session)


def _last(session: Session) -> dict[str, float]:
    records = [json.loads(line) for line in (session.folder / "metrics.jsonl").read_text().splitlines()]
    return next((record for record in reversed(records) if "train/loss" in record), {})


def sample_pairs(config: Any, file: Path, rounds: int) -> int:
    """Pairs of a right and a wrong sample of one prompt, as many as both sides give, from the warm start's samples."""
    session = open_session(make_config(config))
    c = session.config
    source = PromptSource(split_rows(c.data, "train"), session.tokenizer, c.data.prompt_lengths, c.data.seed)
    generate = make_generate(session.model, session.train, session.decode, session.sampling(c), dtype=session.dtype)
    policy, position, count = session.base_params(), DataPosition(), 0
    runner = make_runner(c)
    assert runner is not None
    with runner, file.open("w") as out:
        for number in range(rounds):
            rows, prompts, position = source.take(position, PROMPTS)
            rows = [row for row in rows for _ in range(GROUP)]
            key = session.key(ROLLOUT_KEY, 99, number)
            done = complete(session, generate, policy, repeat_prompts(prompts, GROUP), rows, runner, key, 0)
            texts = [done.samples[i].completion for i in range(len(rows))]
            for start in range(0, len(rows), GROUP):
                group = range(start, start + GROUP)
                right, wrong = ([texts[i] for i in group if done.correct[i] == verdict] for verdict in (1, 0))
                for chosen, rejected in zip(right, wrong, strict=False):
                    out.write(
                        json.dumps({"prompt": rows[start]["prompt"], "chosen": chosen, "rejected": rejected}) + "\n"
                    )
                    count += 1
    return count


def run_seed(seed: int, names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Every method's held-out verdicts, drift and last metrics; what is already in ``folder`` is not run again."""
    results: dict[str, dict[str, Any]] = {}

    def once(name: str, work: Any) -> dict[str, Any]:
        file = folder / f"{name}.json"
        if not file.exists():
            start = time.perf_counter()
            file.write_text(json.dumps({**work(), "seconds": time.perf_counter() - start}))
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        return json.loads(file.read_text())

    def trained(config: Any) -> dict[str, Any]:
        correct, last = run(config)
        return {"correct": correct.tolist(), "last": last}

    def warm_start() -> dict[str, Any]:
        config = common(seed, f"sft-{seed}", folder)
        config.recipe = ("warm_start",)
        config.stages.warm_start.steps = SFT_STEPS
        return trained(config)

    results["start"] = once(f"sft-{seed}", warm_start)
    plain = method_config(METHODS["grpo"], seed, f"pairs-{seed}", folder)
    once(f"pairs-{seed}", lambda: {"pairs": sample_pairs(plain, folder / f"pairs-{seed}.jsonl", STEPS)})
    reward_model = method_config(REWARD_MODEL, seed, f"reward_model-{seed}", folder)
    once(f"reward_model-{seed}", lambda: trained(reward_model))
    if any("@dpo" in METHODS[name].config.values() for name in names):
        names = ["dpo", *(name for name in names if name != "dpo")]
    for name in names:
        label = f"{name.replace(' ', '_').replace(',', '')}-{seed}"
        results[name] = once(
            label, lambda name=name, label=label: trained(method_config(METHODS[name], seed, label, folder))
        )

    def drift() -> dict[str, Any]:
        session = open_session(make_config(plain))
        c = session.config
        source = PromptSource(split_rows(c.data, "test"), session.tokenizer, c.data.prompt_lengths, 0, shuffle=False)
        labels = {name: f"{name.replace(' ', '_').replace(',', '')}-{seed}" for name in names}
        folders = {name: str(folder / label / "model") for name, label in labels.items()}
        folders = {name: place for name, place in folders.items() if Path(place).exists()}
        runner = make_runner(c)
        assert runner is not None
        with runner:
            report = measure_drift(session, list(folders.values()), source, runner)
        return {"start": report["base"], **{name: report[place] for name, place in folders.items()}}

    report = once(f"drift-{seed}", drift)
    for name, result in results.items():
        result["drift"] = report.get(name, {})
    return results


def table(by_seed: dict[int, dict[str, dict[str, Any]]]) -> tuple[str, list[str]]:
    """The markdown table, and what did not come out as expected."""
    lines = [
        "| method | held-out score | 95 % interval | paired difference to the start | verdict | KL, nats a completion "
        "| tokens | clipped | explained variance |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    surprises = []
    start = np.stack([results["start"]["correct"] for results in by_seed.values()], axis=1)
    for name in next(iter(by_seed.values())):
        runs = [results[name] for results in by_seed.values()]
        correct = np.stack([result["correct"] for result in runs], axis=1)
        low, high = bootstrap_interval(correct)
        difference = paired_difference(correct, start)
        verdict = "rises" if difference.low > 0 else "falls" if difference.high < 0 else "no change"
        expected = METHODS[name].rises if name in METHODS else 0
        if {"rises": 1, "no change": 0, "falls": -1}[verdict] != expected and not (
            expected == 0 and verdict == "falls"
        ):
            surprises.append(f"{name}: {verdict}")

        def mean(*path: str, runs: list = runs) -> str:
            values = [result.get(path[0], {}).get(path[1]) for result in runs]
            return "" if None in values else f"{np.mean(values):.2f}"

        clipped = [
            r["last"].get("train/clip_fraction_low", 0) + r["last"].get("train/clip_fraction_high", 0) for r in runs
        ]
        lines.append(
            f"| {name} | {correct.mean():.3f} | {low:.3f} to {high:.3f} | {difference.mean:+.3f} "
            f"({difference.low:+.3f} to {difference.high:+.3f}) | {verdict} | {mean('drift', 'kl_per_completion')} "
            f"| {mean('drift', 'length')} | {np.mean(clipped):.3f} | {mean('last', 'train/explained_variance')} |"
        )
    return "\n".join(lines), surprises


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=";".join(METHODS), help="names, with ; between them")
    parser.add_argument("--folder", type=Path, default=Path("runs/learning_table"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    start_devices(make_config(quickstart()))
    seeds = [int(seed) for seed in options.seeds.split(",")]
    found = {seed: run_seed(seed, options.methods.split(";"), options.folder) for seed in seeds}
    text, surprises = table(found)
    (options.folder / "table.md").write_text(text + "\n")
    print(text)
    for surprise in surprises:
        print(f"not as expected: {surprise}")


if __name__ == "__main__":
    main()
