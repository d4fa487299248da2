"""docs/quickstart.png from a quickstart run's metrics: python docs/plot_quickstart.py runs/quickstart"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(folder: Path, target: Path) -> None:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rl = [r for r in records if "train/correct" in r]
    tests = [r for r in records if "eval/score" in r]
    start = rl[0]["step"] - 1
    tests = [r for r in tests if r["step"] >= start]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [r["step"] - start for r in rl]
    left.plot(steps, [r["train/correct"] for r in rl], label="samples, training prompts")
    scores = [r["eval/score"] for r in tests]
    spread = [
        [r["eval/score"] - r["eval/score_low"] for r in tests],
        [r["eval/score_high"] - r["eval/score"] for r in tests],
    ]
    label = "held out, greedy, 95 % interval"
    left.errorbar([r["step"] - start for r in tests], scores, yerr=spread, fmt="ko", capsize=3, label=label)
    left.set(xlabel="GRPO step", ylabel="exact match", ylim=(0, 1.03), title="it learns to be right")
    left.legend(loc="lower right")
    right.plot(steps, [r["train/completion_length"] for r in rl], color="tab:green")
    right.set(xlabel="GRPO step", ylabel="tokens a completion", ylim=(0, None), title="by showing its work")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).with_name("quickstart.png"))
