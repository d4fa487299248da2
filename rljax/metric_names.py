"""Metrics and samples: the name and meaning of each.

Names under ``time/``, ``speed/`` and ``memory/`` are measured; all others come out the same, bit for bit, when a killed
run is started again.
"""

import re
from collections.abc import Iterable

# Of a split: "eval" is the test split, read before the first step and at the end of each stage, which is the start of
# the next; "dev" chooses the checkpoint to keep.
# These have the ends of their interval beside them, as name_low and name_high.
_WITH_INTERVAL = {
    "score": "the held-out measure: share of right completions, or mean reward; of held-out text mean log-prob a token",
    "sampled_score": "the measure of the samples, where the score is that of greedy completions (eval.greedy)",
    "pass_at_{k}": "unbiased estimate of the share of problems that k samples solve (2107.03374)",
    "maj_at_{k}": "share of problems whose most common answer among k samples is right; ties share the verdict",
    "rerank_at_{k}": "share of problems where the sample ranked first of k by the reward model is right",
}
_ENDS = {
    "low": "lower end of its 95 % bootstrap interval over problems",
    "high": "upper end of its 95 % bootstrap interval over problems",
}
_SCORES = {
    **{
        key: text
        for name, meaning in _WITH_INTERVAL.items()
        for key, text in ((name, meaning), *((f"{name}_{end}", told) for end, told in _ENDS.items()))
    },
    "n": "problems, or rows of text, evaluated, count",
    "score_temperature": "sampling temperature of the scored completions; 0 is greedy",
    "temperature": "sampling temperature for pass@k, maj@k, rerank@k and the sampled score; 0 is greedy",
    "samples": "samples per problem, not counting a greedy completion",
    "max_new_tokens": "token budget of a completion; evaluations use no top-k, top-p or min-p",
    "reward": "mean reward of the scored completions",
    "completion_length": "mean length of all completions, tokens, including the end token",
    "truncated": "share of completions without an end token within the budget",
    "seconds": "duration in seconds; measured",
}

# Of a split's comparisons, where the main stage trains on comparisons; "score" and its interval are the accuracy's.
_COMPARISONS = {
    "comparisons": "pairs of a better and a worse answer, or labelled prefixes, count",
    "accuracy": "share of comparisons whose better answer has the higher reward (ties: half), or of labels predicted",
    "accuracy_low": "lower end of its 95 % bootstrap interval over rows",
    "accuracy_high": "upper end of its 95 % bootstrap interval over rows",
    "margin": "reward of the better answer minus that of the worse",
    "margin_low": "lower end of its 95 % bootstrap interval over rows",
    "margin_high": "upper end of its 95 % bootstrap interval over rows",
    "ece": "expected calibration error of the sigmoid of the difference (of the logit), ten bins of confidence",
    "auc": "chance that a right prefix has a higher logit than a wrong one",
    "length_accuracy": "accuracy of preferring the longer answer",
    "matched_comparisons": "comparisons whose lengths differ by at most a tenth, count",
    "matched_accuracy": "accuracy on those",
    "matched_accuracy_low": "lower end of its 95 % bootstrap interval over rows",
    "matched_accuracy_high": "upper end of its 95 % bootstrap interval over rows",
    "sample_accuracy": "share of pairs of samples with unequal true reward that the reward model orders correctly",
    "sample_accuracy_low": "lower end of its 95 % bootstrap interval over prompts",
    "sample_accuracy_high": "upper end of its 95 % bootstrap interval over prompts",
    "sample_prompts": "prompts with samples of unequal true reward, count",
    "best_of_{k}": "expected true reward (share right, where judged) of the sample of k that the reward model picks",
}

# Of a split's text, where nothing judges completions; "score" and its interval are those of the mean log-prob.
_TEXT = {
    "tokens": "trained tokens of the held-out text, count",
    "nll": "negative log-likelihood of the held-out text, nats a trained token",
    "nll_low": "lower end of its 95 % bootstrap interval over rows",
    "nll_high": "upper end of its 95 % bootstrap interval over rows",
    "perplexity": "exp of that",
    "perplexity_low": "lower end of its 95 % bootstrap interval over rows",
    "perplexity_high": "upper end of its 95 % bootstrap interval over rows",
}

METRICS: dict[str, str] = {
    "train/reward": "mean reward of the policy's completions of the step, all parts weighted and summed",
    "train/reward_rival": "mean reward of the rival's completions (XPO: the reference; Nash-MD: the mixture)",
    "train/reward_std": "standard deviation (biased) of the policy's rewards",
    "train/reward/{part}": "mean of one reward before its weight, or of its part name/part over rows that have it",
    "train/reward_by_dataset/{dataset}": "mean reward of the completions of that dataset",
    "train/reward_std_by_dataset/{dataset}": "standard deviation (biased) of their rewards",
    "train/reward_by_dataset/{dataset}/{part}": "mean of one reward, or part, of theirs, as train/reward/{part}",
    "train/reward_failures": "completions whose reward raised, timed out or was not finite, count",
    "train/correct": "share of completions judged right",
    "train/completion_length": "mean completion length, tokens, including the end token",
    "train/completion_length_max": "longest completion, tokens",
    "train/completion_length_right": "mean length of completions judged right, tokens; absent if there are none",
    "train/completion_length_wrong": "mean length of completions judged wrong, tokens; absent if there are none",
    "train/truncated": "share of completions without an end token within the budget",
    "train/groups_all_right": "share of groups with right completions only",
    "train/groups_all_wrong": "share of groups with wrong completions only",
    "train/groups_kept": "share of sampled groups that dynamic sampling kept; 1 without it (rollout.keep_groups all)",
    "train/rounds": "rounds of dynamic sampling, count",
    "train/kl_per_token": "KL of the sampling policy to the reference on its own samples (log ratio), nats a token",
    "train/kl_per_completion": "the same summed over a completion, nats a completion",
    "train/behavior_kl": "KL of the sampler to the current policy (k3), nats a token, mean over the step's updates",
    "train/max_log_ratio": "largest |log-prob now - log-prob when sampled| of any token in the step, nats",
    "train/first_max_log_ratio": "the same in the first update, before anything was learnt: rounding only, nats",
    "train/logprob_gap": "mean |sampler's log-prob - trainer's| before the first update, nats a token",
    "train/clip_fraction_low": "share of tokens without a gradient because the ratio is below the lower clip edge",
    "train/clip_fraction_high": "share of tokens without a gradient because the ratio is above the upper clip edge",
    "train/entropy": "mean entropy of the policy's next-token distribution, nats a token",
    "train/perplexity": "exp of the mean negative log-prob of the completions under the policy",
    "train/advantage_mean": "mean advantage before whitening",
    "train/advantage_std_raw": "standard deviation of the advantages before whitening",
    "train/loss": "the loss that was differentiated, mean over the step's updates",
    "train/policy": "its policy term",
    "train/kl": "its KL term, before the coefficient",
    "train/entropy_bonus": "its entropy term, before the coefficient",
    "train/nll": "its negative log-likelihood term, nats a token",
    "train/text_nll": "negative log-likelihood of the text that is mixed in (text_mix), nats a token",
    "train/dft": "its dynamic fine-tuning term, in place of the negative log-likelihood",
    "train/uniform_nll": "mean negative log-prob over the vocabulary, before label smoothing's weight, nats a token",
    "train/z_loss": "mean square of the logits' log normaliser, before its coefficient",
    "train/value": "its value term, before the coefficient",
    "train/distillation": "its divergence from the teacher, nats a token",
    "train/value_ema": "the critic's loss towards its own running mean, before the coefficients",
    "train/value_mean": "mean value predicted by the critic",
    "train/return_mean": "mean return that the critic is fitted to",
    "train/value_clip_fraction": "share of tokens whose value moved past the clip since the rollout",
    "train/explained_variance": "1 - variance of return less value over that of the return, when sampled; 1 is perfect",
    "train/kl_coef": "coefficient of the KL in the step's rewards; changes if adaptive",
    "train/correction_weight": "mean off-policy weight of a token, after truncation",
    "train/exploration": "log-prob of the reference's completion (XPO), nats a completion, before its coefficient",
    "train/win_chance": "mean chance that the policy's completion beats its rival (Nash-MD)",
    "train/preference": "its preference term, mean over pairs, rankings or labelled rows",
    "train/classification": "its term of labelled prefixes, mean over labels",
    "train/margin": "reward of chosen minus rejected, as the preference loss sees it",
    "train/accuracy": "share of pairs whose chosen side has the higher reward, or of labels met",
    "train/score": "mean score that a reward model gives to the step's answers",
    "train/confidence": "mean probability a reward model gives to what it prefers; above accuracy: overconfident",
    "train/probability": "mean probability that a labelled prefix is right, by the model",
    "train/label": "mean label of the labelled prefixes",
    "train/reward_chosen": "mean reward of chosen answers, as the preference loss sees it",
    "train/reward_rejected": "mean reward of rejected answers",
    "train/reward_desirable": "mean implicit reward of answers labelled desirable",
    "train/reward_undesirable": "mean implicit reward of answers labelled undesirable",
    "train/logprob_chosen": "mean log-prob of chosen answers, a sum or a mean over tokens as the loss takes it",
    "train/logprob_rejected": "mean log-prob of rejected answers",
    "train/reference_point": "KTO's reference point, the mean implicit reward of mismatched answers or 0",
    "train/shift": "BCO's shift, the running mean of its rewards",
    "train/grad_norm/{tree}": "norm of that tree's gradient before clipping",
    "train/update_ratio/{tree}": "norm of that tree's update over the norm of its parameters",
    "train/learning_rate": "learning rate of the step's first update",
    "train/learning_rate/{tree}": "the same, by trained tree",
    "train/skipped": "updates of the step that were skipped because loss or gradient was not finite, count",
    "train/optimizer_steps": "optimizer steps taken so far, count",
    "train/prompts": "prompts drawn so far, count",
    "train/episodes": "completions sampled, or rows drawn, so far, count",
    "train/tokens": "prompt and completion tokens of the updates so far, count",
    "train/epoch": "passes over the training data so far",
    **{f"eval/{name}": f"{meaning} (test split)" for name, meaning in _SCORES.items()},
    **{f"dev/{name}": f"{meaning} (dev split)" for name, meaning in _SCORES.items()},
    **{f"eval/{name}": f"{meaning} (test split)" for name, meaning in _COMPARISONS.items()},
    **{f"dev/{name}": f"{meaning} (dev split)" for name, meaning in _COMPARISONS.items()},
    **{f"eval/{name}": f"{meaning} (test split)" for name, meaning in _TEXT.items()},
    **{f"dev/{name}": f"{meaning} (dev split)" for name, meaning in _TEXT.items()},
    "data/overlap_exact": "evaluation prompts that are a training prompt of any stage too, count",
    "data/overlap_8gram": "evaluation prompts that share 8 words in a row with one, or are one, count",
    "data/overlap_dev_test": "test prompts that share 8 words in a row with a dev prompt, or are one, count",
    "data/duplicates": "training prompts that occur more than once in their stage, count",
    "data/too_long": "training rows of all stages left out because they exceed the budget, count",
    "data/unusable": "training rows of all stages left out because they prefer nothing (data.bad_rows), count",
    "rollout/occupied_slot_share": "share of (slot, decode step) pairs that held an unfinished completion",
    "rollout/staleness": "optimizer steps that the trained policy is ahead of the one that sampled, count",
    "rollout/decode_steps": "decode steps of the rollout, count",
    "time/rollout_s": "sampling, until the last completion is on the hosts, seconds",
    "time/reward_s": "rewards, from then on, seconds",
    "time/host_idle_s": "time during sampling and rewards in which the hosts had nothing to decode or reward, seconds",
    "time/device_idle_s": "time during sampling and rewards in which the devices ran no rollout, seconds",
    "time/score_s": "reference and other scoring passes, seconds",
    "time/update_s": "gradients and updates, seconds",
    "time/step_s": "the whole step, seconds",
    "speed/rollout_tokens_per_s": "sampled tokens per second of sampling",
    "speed/score_tokens_per_s": "tokens of the step per second of scoring and targets; absent in offline stages",
    "speed/update_tokens_per_s": "tokens of the step per second of updating",
    "speed/tokens_per_s": "prompt and completion tokens per second of the whole step",
    "speed/tokens_per_s_per_chip": "the same, divided by the number of devices",
    "speed/mfu": "model FLOPs of the update as a share of the devices' bf16 peak; absent if the peak is unknown",
    "memory/peak_gib": "peak memory use of the first local device so far, GiB; absent if it is not reported",
    "event/text": "other events, such as a stop with its reason, or a resumption",
    "nonfinite": "values of this record that were not finite (written as null), count; absent if 0",
}

SAMPLES: dict[str, str] = {
    "prompt_id": "row of the split",
    "sample_id": "which completion of that prompt",
    "prompt": "the prompt as text",
    "completion": "the completion as text, without end tokens",
    "finished": "whether an end token was sampled",
    "reward": "total reward",
    "correct": "whether it is right; null where nothing judges",
    "answer": "the answer that was extracted; null where none was",
    "parts": "value of every reward by name, and of its parts as name/part",
    "token_ids": "the completion's ids",
    "failures": "why, by reward, it got no value; of phase `failed` only",
}


def undocumented(names: Iterable[str]) -> list[str]:
    """The names that METRICS does not describe; a ``{part}`` in METRICS stands for any text."""
    patterns = [re.sub(r"\\\{\w+\\\}", ".+", re.escape(known)) for known in METRICS]
    return [name for name in names if not re.fullmatch("|".join(patterns), name)]


def is_measured(name: str) -> bool:
    """Whether a metric is a measurement of the machine, which no two runs share."""
    return name.startswith(("time/", "speed/", "memory/")) or name.endswith("/seconds")


def document() -> str:
    """The text of docs/metrics.md."""
    lines = [_INTRODUCTION]
    for group in dict.fromkeys(name.partition("/")[0] for name in METRICS):
        rows = [(k, v) for k, v in METRICS.items() if k.partition("/")[0] == group]
        lines += [f"\n## {group}\n", "| key | meaning |", "|---|---|", *(f"| `{k}` | {v} |" for k, v in rows)]
    lines += ["\n## samples.jsonl\n", _SAMPLE_PHASES]
    lines += ["| key | meaning |", "|---|---|", *(f"| `{k}` | {v} |" for k, v in SAMPLES.items())]
    return "\n".join(lines) + "\n"


_SAMPLE_PHASES = """Besides `step` and `phase` a line has these keys. The phase is the split, `train`, or `failed` for
completions whose reward raised, timed out or was not finite (the first 8 of a step or an evaluation).
"""

_INTRODUCTION = """# Metrics

Written by `python -c "from rljax.metric_names import document; print(document(), end='')" > docs/metrics.md`.

`metrics.jsonl` holds one JSON object per line, in chronological order. Each has a `step` (steps of the loop so far,
over all stages; 0 is before the first) and a `phase` (the stage of the recipe, `data`, `eval` or `event`). A key is
absent where it has no meaning. A value that is not finite is written as `null`, and `nonfinite` counts them per line.
Each step appears once, even if the run was killed and resumed. Keys under `time/`, `speed/` and `memory/` and those
ending in `/seconds` are measurements; all others are identical, bit for bit, in every run of one config on the same
mesh and versions. The test split (`eval/`) is read before the first step and at the end of each stage, where the next
one starts; the dev split also every `eval.every_steps`. Shares range from 0 to 1; logarithms are natural. Where a rival
model writes half of a step's completions (XPO, Nash-MD), `train/` metrics of completions describe the policy's own.

```python
import pandas as pd

curve = pd.read_json("runs/quickstart/metrics.jsonl", lines=True).dropna(subset="eval/score")[["step", "eval/score"]]
```"""
