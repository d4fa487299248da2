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
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks.learning_methods import GROUP, METHODS, PROMPTS, REWARD_MODEL, SFT_STEPS, STEPS, Method
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
        return {"correct": correct.astype(int).tolist(), "last": last}

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


def results_of_seed(seed: int, names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """What ``run_seed`` finds, kept in one file a seed: the table can be printed from those alone."""
    file = folder / f"seed-{seed}.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    if not {"start", *names} <= set(kept):
        kept = run_seed(seed, names, folder)
        file.write_text(json.dumps(kept))
    return {name: kept[name] for name in ("start", *names)}


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
    found = {seed: results_of_seed(seed, options.methods.split(";"), options.folder) for seed in seeds}
    text, surprises = table(found)
    (options.folder / "table.md").write_text(text + "\n")
    print(text)
    for surprise in surprises:
        print(f"not as expected: {surprise}")


if __name__ == "__main__":
    main()
