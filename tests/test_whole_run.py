"""What a finished run leaves to read: its samples, its scores counted again, the policy for transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers

from rljax.config import make_config
from rljax.data.batches import DataPosition
from rljax.models.decoder import Params
from rljax.rewards.base import Score
from rljax.rollouts import Completions
from rljax.run import finish, open_training
from rljax.session import Session, open_session
from rljax.stage_steps import online_step
from rljax.trainer import train
from tests.models.tiny import layout, random_tokens, row_logits
from tests.tiny import lines, tiny_config

REWARD = "tests.test_whole_run:graded"
ROWS = {"dev": 6, "test": 5}  # in calls of four prompts: neither is a multiple
SHOWN_OF_A_STEP = 4


def graded(prompt: str, completion: str) -> Score:
    """The share of even digits, right from a third on; the answer is the first character."""
    share = sum(c in "02468" for c in completion) / max(len(completion), 1)
    return Score(share, share >= 1 / 3, completion[:1] or None, {"characters": len(completion)})


class Done(NamedTuple):
    session: Session
    policy: Params
    start: Params
    steps: list[Completions]  # of every training step
    evaluations: dict[str, tuple[dict[str, float], list[Completions]]]  # of the trained policy
    prompts: dict[str, Any]  # of every split

    @property
    def folder(self) -> Path:
        return Path(self.session.folder)

    def samples(self, phase: str) -> dict[int, list[dict[str, Any]]]:
        """By step."""
        found: dict[int, list[dict[str, Any]]] = {}
        for record in lines(self.folder, "samples.jsonl"):
            if record["phase"] == phase:
                found.setdefault(record["step"], []).append(record)
        return found

    def text(self, host: Any, i: int) -> str:
        return self.session.tokenizer.decode(host.tokens[i][host.loss_mask[i]].tolist())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """Two steps of GRPO, evaluated before, between and behind them."""
    settings = {
        "output_dir": str(tmp_path_factory.mktemp("whole") / "run"),
        "mesh": "1,1,1",
        "recipe": ("main",),
        "steps": 2,
        "reward.names": (REWARD,),
        "log.samples_per_step": SHOWN_OF_A_STEP,
        **{f"data.{split}_rows": count for split, count in ROWS.items()},
        **{"eval.every_steps": 1, "eval.greedy": True, "eval.samples": 2, "eval.temperature": 1.0},
        **{"eval.prompts_per_batch": 4, "eval.shown_prompts": max(ROWS.values())},
    }
    steps = []

    def kept(*arguments: Any) -> Any:
        result = online_step(*arguments)
        steps.append(result.completions)
        return result

    session = open_session(make_config(tiny_config(**settings)), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch, open_training(session) as run:
        patch.setattr("rljax.trainer.online_step", kept)
        train(run)
        finish(run)
        assert run.trees is not None
        policy = run.trees["policy"]
        evaluations = {split: evaluator.run(policy, 2) for split, evaluator in run.evaluators.items()}
        prompts = {s: e.source.take(DataPosition(), len(e.source))[1] for s, e in run.evaluators.items()}
        yield Done(session, policy, session.base_params(), steps, evaluations, prompts)


def test_the_same_prompts_are_shown_at_every_evaluation(done: Done) -> None:
    for split, rows in ROWS.items():
        shown = done.samples(split)
        assert list(shown) == ([0, 1, 2] if split == "dev" else [0, 2])
        prompts = [[(r["prompt_id"], r["sample_id"], r["prompt"]) for r in records] for records in shown.values()]
        tokens, valid = done.prompts[split][:2]
        expected = [(i, 0, done.session.tokenizer.decode(tokens[i][valid[i]].tolist())) for i in range(rows)]
        assert prompts == [expected] * len(shown)
        written = [[r["completion"] for r in records] for records in shown.values()]
        assert written[0] != written[-1]  # another policy
    assert {r["correct"] for records in done.samples("dev").values() for r in records} == {True, False}


def test_scores_are_those_of_the_completions_that_are_shown(done: Done) -> None:
    """All prompts are shown with their greedy completion, which the score is of."""
    records = lines(done.folder)
    for split, prefix in (("dev", "dev"), ("test", "eval")):
        measured = {r["step"]: r for r in records if f"{prefix}/score" in r}
        for step, shown in done.samples(split).items():
            scores = [graded("", r["completion"]) for r in shown]
            assert [r["reward"] for r in shown] == pytest.approx([s.value for s in scores])
            assert measured[step][f"{prefix}/score"] == pytest.approx(np.mean([s.correct for s in scores]))
            assert measured[step][f"{prefix}/reward"] == pytest.approx(np.mean([s.value for s in scores]))
            assert (measured[step][f"{prefix}/n"], measured[step][f"{prefix}/samples"]) == (ROWS[split], 2)


def test_samples_behind_a_greedy_completion_are_counted_without_the_rows_that_fill_up(done: Done) -> None:
    """Chances of one and of two samples by hand, over the problems that there are."""
    for split, (metrics, batches) in done.evaluations.items():
        assert len(batches) == 2
        right = {}
        for batch in batches:
            for i in np.flatnonzero(batch.host.valid.any(axis=1)):
                key = (int(batch.host.prompt_id[i]), int(batch.host.sample_id[i]))
                right[key] = graded("", done.text(batch.host, i)).correct
        table = np.array([[right[row, sample] for sample in range(3)] for row in range(ROWS[split])], float)
        assert len(right) == table.size and 0 < table[:, 1:].mean() < 1
        assert metrics["score"] == pytest.approx(table[:, 0].mean())
        assert metrics["sampled_score"] == pytest.approx(table[:, 1:].mean())
        assert metrics["pass_at_2"] == pytest.approx(table[:, 1:].max(axis=1).mean())


def test_a_step_shows_its_best_its_worst_and_others(done: Done) -> None:
    shown = done.samples("train")
    assert list(shown) == [1, 2]
    for step, records in shown.items():
        host = done.steps[step - 1].host
        row_of = {(int(p), int(s)): i for i, (p, s) in enumerate(zip(host.prompt_id, host.sample_id, strict=True))}
        scores = [graded("", done.text(host, i)) for i in range(len(host.tokens))]
        values = [score.value for score in scores]
        assert len({(r["prompt_id"], r["sample_id"]) for r in records}) == len(records) == SHOWN_OF_A_STEP
        assert (records[0]["reward"], records[-1]["reward"]) == pytest.approx((max(values), min(values)))
        assert max(values) > min(values)
        for record in records:
            i = row_of[record["prompt_id"], record["sample_id"]]
            prompt = host.valid[i] & ~host.loss_mask[i]
            ids = host.tokens[i][host.loss_mask[i]].tolist()
            assert record == {
                "step": step,
                "phase": "train",
                "prompt_id": record["prompt_id"],
                "sample_id": record["sample_id"],
                "prompt": done.session.tokenizer.decode(host.tokens[i][prompt].tolist()),
                "completion": done.text(host, i),
                "finished": ids[-1] in done.session.tokenizer.end_ids,
                "reward": pytest.approx(values[i]),
                "correct": scores[i].correct,
                "answer": scores[i].answer,
                "parts": {REWARD: pytest.approx(values[i]), f"{REWARD}/characters": scores[i].parts["characters"]},
                "token_ids": ids,
            }
    ids = [[(r["prompt_id"], r["sample_id"]) for r in records] for records in shown.values()]
    assert ids[0] != ids[1]


def test_transformers_opens_the_policy_and_says_the_same(done: Done) -> None:
    """Logits of the state in memory, and the greedy completions of the last evaluation."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(done.folder / "model").eval()

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()

    tokens = random_tokens(done.session.model.config.vocab_size, 3, 24)
    valid = np.ones(tokens.shape, bool)
    ours, before = (row_logits(done.session.model, layout(), p, tokens, valid) for p in (done.policy, done.start))
    np.testing.assert_allclose(ours, logits(tokens), rtol=0, atol=1e-4)
    assert np.abs(before - ours).max() > 1e-2
    tokens, valid = done.prompts["test"][:2]
    for record in done.samples("test")[2]:
        prompt = tokens[record["prompt_id"]][valid[record["prompt_id"]]]
        row = np.concatenate([prompt, record["token_ids"]])
        likeliest = logits(row[None])[0].argmax(axis=-1)[len(prompt) - 1 : -1]
        assert likeliest.tolist() == record["token_ids"]
