"""Console output: one aligned line per step, evaluations, and a progress bar."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

HEADER_EVERY = 25
SHOWN_SAMPLES = 2
WIDTH = 8

# Metrics that are added up, heading, format; a column stands in the table where the step has one of its metrics.
COLUMNS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("train/reward",), "reward", ".3f"),
    (("train/correct",), "correct", ".3f"),
    (("train/loss",), "loss", ".4f"),
    (("train/accuracy",), "accuracy", ".3f"),
    (("train/completion_length",), "length", ".1f"),
    (("train/kl_per_completion",), "kl", ".3f"),
    (("train/clip_fraction_low", "train/clip_fraction_high"), "clipped", ".4f"),
    (("train/entropy",), "entropy", ".3f"),
    (("speed/tokens_per_s",), "tokens/s", ",.0f"),
    (("time/rollout_s",), "t_roll", ".2f"),
    (("time/reward_s",), "t_reward", ".2f"),
    (("time/score_s",), "t_score", ".2f"),
    (("time/update_s",), "t_update", ".2f"),
)
LEGEND = "kl in nats a completion, length in tokens, t_* in seconds; every metric is explained in docs/metrics.md"


class Console:
    """Lines go to standard output, the bar to standard error and only where that is a terminal."""

    def __init__(self, total_steps: int, *, shown: bool = True):
        self._shown = shown
        self._digits = max(len(str(total_steps)), len("step"))
        self._headings: list[str] = []
        self._rows_since_header = 0
        self._bar = tqdm(
            total=total_steps or None, unit="step", dynamic_ncols=True, leave=False, disable=None if shown else True
        )

    def start_at(self, step: int) -> None:
        """The bar of a resumed run begins here; its speed counts from here."""
        self._bar.initial = self._bar.n = step

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        scores = [name.removesuffix("/score") for name in metrics if name.endswith("/score")]
        for split in scores:
            self._evaluation(step, split, metrics)
        if not scores:
            self._row(step, metrics)
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        if self._shown:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The first completions of an evaluation, one line each, cut to the width: the same prompts every time."""
        width = shutil.get_terminal_size((120, 24)).columns
        for row in rows[:SHOWN_SAMPLES]:
            self.say(_sample_line(row, width))

    def close(self) -> None:
        self._bar.close()

    def _row(self, step: int, metrics: Mapping[str, Any]) -> None:
        columns = [
            (heading, format(sum(metrics[name] for name in names if name in metrics), form))
            for names, heading, form in COLUMNS
            if any(name in metrics for name in names)
            # With a reward the loss is a surrogate: its gradient means something, its value does not.
            and not (heading == "loss" and "train/reward" in metrics)
        ]
        if not columns:
            return
        headings = [heading for heading, _ in columns]
        if headings != self._headings or self._rows_since_header == HEADER_EVERY:
            if not self._headings:
                self.say(LEGEND)
            self.say(self._line("step", headings))
            self._headings, self._rows_since_header = headings, 0
        self.say(self._line(str(step), [text for _, text in columns]))
        self._rows_since_header += 1

    def _line(self, step: str, cells: list[str]) -> str:
        return " ".join([step.rjust(self._digits), *(cell.rjust(WIDTH) for cell in cells)])

    def _evaluation(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        def value(name: str, form: str) -> str:
            return format(metrics[f"{split}/{name}"], form)

        text = f"{str(step).rjust(self._digits)}  {split} score {value('score', '.3f')}"
        if f"{split}/score_low" in metrics:
            text += f", 95 % interval {value('score_low', '.3f')} to {value('score_high', '.3f')}"
        if f"{split}/n" in metrics:
            text += f", {value('n', 'd')} {'rows of text' if f'{split}/nll' in metrics else 'problems'}"
        self.say(text)


def _sample_line(row: Mapping[str, Any], width: int) -> str:
    """``prompt -> completion  (reward 1.000)``: of a long prompt its end, in a third of the room."""
    prompt, completion = (" ".join(row[name].split()) for name in ("prompt", "completion"))
    reward = f"  (reward {row['reward']:.3f})"
    room = max(width - len(f"      {reward} -> "), 20)
    for_prompt = max(room // 3, room - len(completion))
    if len(prompt) > for_prompt:
        prompt = "…" + prompt[1 - for_prompt :]
    if len(completion) > room - len(prompt):
        completion = completion[: room - len(prompt) - 1] + "…"
    return f"      {prompt} -> {completion}{reward}"
