"""From texts to rewards: sentences' scores on tokens, samples that train nothing, a reward model beside a verifier."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rljax.collect import kept_groups
from rljax.config import RolloutConfig
from rljax.data.batches import DataPosition, repeat_prompts
from rljax.metric_names import undocumented
from rljax.pieces import Written, cut_pieces, overlapped
from rljax.rewards.base import Score, Span
from rljax.rewards.runner import RewardRunner
from rljax.rollout_metrics import row_metrics
from rljax.rollouts import Completions, ModelReward, Rival, complete
from rljax.session import ROLLOUT_KEY
from rljax.setup import make_source
from rljax.types import FINISH_END, Prompts, Rollout
from tests.truths import tiny_session

ONE, TWO, END = 4, 5, 2  # "1", "2" and the end token


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep_groups": "mixed"}, [False, True, True, False, True]),
        ({"keep_groups": "mixed", "keep_between": (0.1, 0.6)}, [False, True, False, False, True]),
        ({"keep_groups": "unequal"}, [True, True, True, False, True]),
    ],
)
def test_groups_are_kept_by_right_and_wrong_or_by_reward(settings: dict[str, Any], expected: list[bool]) -> None:
    """All right but of unequal reward, 2 of 4 right, 3 of 4, none, and one that nothing judges."""
    correct = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [-1, -1, -1, -1]])
    rewards = np.where(correct < 0, [0, 1, 2, 3], correct) + np.array([[0, 0, 0, -0.5]] + [[0] * 4] * 4)
    done = SimpleNamespace(correct=correct.ravel(), rewards=rewards.ravel())
    kept = kept_groups(done, RolloutConfig(group_size=4, **settings))  # type: ignore[arg-type]
    assert kept.tolist() == expected


def completed(
    reward: Callable[..., Any],
    model: ModelReward | None = None,
    mesh: str = "1,1,1",
    pieces: int = 1,
    has_rival: bool = False,
    **overrides: Any,
) -> Completions:
    """Four prompts, each completed with "1" and "12" and the end token, judged by ``reward``; a rival writes "12"."""
    session = tiny_session(mesh, **overrides)

    def generate(params: Any, prompts: Prompts, key: Any, version: Any) -> Rollout:
        budget = np.zeros((len(prompts.tokens), 8), np.int32)
        long = np.asarray(prompts.sample_id) == 1
        budget[:, 0], budget[:, 1], budget[:, 2] = ONE, np.where(long, TWO, END), np.where(long, END, 0)
        nothing, sampled = np.zeros(prompts.tokens.shape), budget > 0
        return Rollout(
            tokens=jnp.asarray(np.hstack([prompts.tokens, budget])),
            valid=jnp.asarray(np.hstack([prompts.valid, sampled])),
            loss_mask=jnp.asarray(np.hstack([nothing, sampled]).astype(bool)),
            behavior_logprobs=jnp.asarray(np.hstack([nothing, -0.5 * sampled])),
            support=jnp.asarray(np.hstack([nothing, nothing[:, :8]]) - np.inf),
            finish_reason=jnp.full(len(budget), FINISH_END),
            prompt_id=prompts.prompt_id,
            sample_id=prompts.sample_id,
            group_id=prompts.prompt_id,
            step_version=jnp.full(len(budget), version),
            decode_steps=jnp.full(len(budget), 3),
            slot_steps=jnp.full(len(budget), 3.0),
        )

    rows, prompts, _ = make_source(session, session.config).take(DataPosition(), 4)
    rows = [row for row in rows for _ in range(2)]
    with RewardRunner([("reward", reward, 2.0)], workers=1) as runner:
        key = session.key(ROLLOUT_KEY)
        prompts, rival = repeat_prompts(prompts, 2), Rival(generate, {}, 2) if has_rival else None
        return complete(session, generate, {}, prompts, rows, runner, key, 0, model, rival, pieces)


@pytest.mark.parametrize("has_rival", [False, True])
def test_pieces_are_the_rows_of_the_whole_in_their_order(has_rival: bool) -> None:
    """Two pieces on two data shards, by one writer or by two; steps of programs that run in turn add up."""

    def judged(prompt: str, completion: str) -> Score:
        return Score(len(prompt) + len(completion) / 2, correct=len(completion) == 2, spans=(Span(0, 1, 0.5),))

    whole = completed(judged, mesh="1,2,1", has_rival=has_rival)
    cut = completed(judged, mesh="1,2,1", has_rival=has_rival, pieces=2)
    assert cut.host.loss_mask.sum(axis=1).tolist() == [2, 3] * 4
    for name in set(Rollout._fields) - {"decode_steps"}:
        np.testing.assert_array_equal(getattr(cut.host, name), getattr(whole.host, name), err_msg=name)
        np.testing.assert_array_equal(np.asarray(getattr(cut.rollout, name)), getattr(whole.host, name))
    programs = 2 if has_rival else 1
    assert set(whole.host.decode_steps) == {3 * programs} and set(cut.host.decode_steps) == {6 * programs}
    for name in ("rewards", "correct", "dense"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name))
    assert list(cut.samples.items()) == list(whole.samples.items())
    assert cut.answers == whole.answers and len(cut.rollout.tokens.sharding.device_set) == 2


def test_what_is_said_of_completions_is_said_of_the_policy_s_own() -> None:
    """ "1" is the policy's, "12" the rival's; one is worth 2, the other 4, and only the rival's is right."""

    def judged(prompt: str, completion: str) -> Score:
        rare = {"long": 1.0} if len(completion) == 2 else {}
        return Score(float(len(completion)), correct=len(completion) == 2, parts=rare)

    done = completed(judged, has_rival=True)
    found = row_metrics([done], 2, rivals=True)
    assert (found["train/reward"], found["train/reward_rival"], found["train/reward_std"]) == (2, 4, 0)
    assert (found["train/reward/reward"], found["train/correct"], found["train/groups_all_wrong"]) == (1, 0, 1)
    assert found["train/completion_length_max"] == 2 and "train/reward/reward/long" not in found
    both = row_metrics([done], 2)
    assert (both["train/reward"], both["train/correct"], both["train/groups_all_wrong"]) == (3, 0.5, 0)
    assert "train/reward_rival" not in both and both["train/reward/reward/long"] == 1


def test_each_dataset_has_its_reward_its_spread_and_its_parts() -> None:
    """ "1" is worth 2, "12" is worth 4 and long; one "1" is of another dataset than the other seven completions."""

    def judged(prompt: str, completion: str) -> Score:
        return Score(float(len(completion)), parts={"long": 1.0} if len(completion) == 2 else {})

    done = completed(judged)
    done = done._replace(rows=[{**row, "dataset": "rest" if i == 6 else "sums"} for i, row in enumerate(done.rows)])
    found = row_metrics([done], 2)
    # (3·2 + 4·4) / 7, and the root of (3·2² + 4·4²) / 7 - (22 / 7)² = 48 / 49.
    of_sums = (found["train/reward_by_dataset/sums"], found["train/reward_std_by_dataset/sums"])
    np.testing.assert_allclose(of_sums, (22 / 7, (48 / 49) ** 0.5))
    np.testing.assert_allclose(found["train/reward_by_dataset/sums/reward"], 11 / 7)  # before its weight
    assert found["train/reward_by_dataset/sums/reward/long"] == 1
    assert (found["train/reward_by_dataset/rest"], found["train/reward_std_by_dataset/rest"]) == (2, 0)
    assert found["train/reward_by_dataset/rest/reward"] == 1
    assert "train/reward_by_dataset/rest/reward/long" not in found
    assert undocumented(found) == []


def test_a_piece_has_whole_groups_of_every_shard() -> None:
    """16 rows, two shards of 8: each piece has 4 of either."""
    assert cut_pieces(16, 2, 2).tolist() == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]


def test_a_piece_is_read_while_the_next_is_written() -> None:
    """The second is not written before somebody reads the first."""
    reading = threading.Event()

    def write(piece: np.ndarray) -> list[Written]:
        assert piece[0] == 0 or reading.wait(10)
        return [Written(piece, None, None)]  # type: ignore[arg-type]

    def read(written: list[Written]) -> int:
        reading.set()
        return int(written[0].rows[0])

    written, reads, times = overlapped(write, read, np.arange(3)[:, None])
    assert reads == [0, 1, 2] and [each.rows[0] for each in written] == reads
    assert min(times) >= 0 and times.host_idle <= times.rollout + times.reward


def test_spans_become_rewards_of_tokens() -> None:
    """ "12": .5 for the "1" and -.25 for the "2", times the reward's weight of 2; nothing for the shorter one."""

    def judged(prompt: str, completion: str) -> Score:
        return Score(0.0, spans=(Span(0, 1, 0.5), Span(1, 2, -0.25)) if len(completion) == 2 else ())

    done = completed(judged)
    assert done.dense is not None and not done.dense[0::2].any()
    for row in range(1, 8, 2):
        sampled = done.dense[row][done.host.loss_mask[row]]
        np.testing.assert_allclose(sampled, [1.0, -0.5, 0.0])
        np.testing.assert_allclose(done.dense[row].sum(), sampled.sum())
    assert completed(lambda prompt, completion: 1.0).dense is None


def failing(prompt: str, completion: str) -> float:
    if len(completion) == 2:
        raise ValueError("2 scores for the 1 sentences of a completion")
    return 1.0


def test_samples_whose_reward_failed_train_nothing_where_asked() -> None:
    kept, left_out = completed(failing), completed(failing, **{"reward.discard_failed": True})
    assert kept.failures == left_out.failures == 4
    assert kept.host.loss_mask.any(axis=1).all()
    np.testing.assert_array_equal(left_out.host.loss_mask.any(axis=1), [True, False] * 4)
    np.testing.assert_array_equal(np.asarray(left_out.rollout.loss_mask), left_out.host.loss_mask)
    np.testing.assert_array_equal(left_out.rewards, kept.rewards)
    # What is left out is not in the text's likelihood either: each token sampled has log-prob -.5.
    for done in (kept, left_out):
        np.testing.assert_allclose(row_metrics([done], 2)["train/perplexity"], np.exp(0.5))


def test_a_reward_model_adds_its_score_or_a_bonus() -> None:
    """The verifier gives 2 to "12" and 0 to "1"; the model 8 to the first four rows and 6 to the others."""

    def verified(prompt: str, completion: str) -> float:
        return float(len(completion) == 2)

    def scores(rollout: Rollout) -> Any:
        return jnp.array([8.0] * 4 + [6.0] * 4)

    plain = completed(verified, ModelReward(scores, 0.5))
    np.testing.assert_allclose(plain.rewards, [4, 6, 4, 6, 3, 5, 3, 5])
    bonus = completed(verified, ModelReward(scores, 1.0, threshold=7.0))
    np.testing.assert_allclose(bonus.rewards, [0, 3, 0, 3, 0, 1.5, 0, 1.5])
    np.testing.assert_allclose(bonus.parts["model"], [8.0] * 4 + [6.0] * 4)
