"""From texts to rewards: sentences' scores on tokens, samples that train nothing, a reward model beside a verifier."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from rljax.data.batches import DataPosition, repeat_prompts
from rljax.rewards.base import Score, Span
from rljax.rewards.runner import RewardRunner
from rljax.rollouts import Completions, ModelReward, complete
from rljax.session import ROLLOUT_KEY
from rljax.setup import make_source
from rljax.types import FINISH_END, Prompts, Rollout
from tests.truths import tiny_session

ONE, TWO, END = 4, 5, 2  # "1", "2" and the end token


def completed(reward: Callable[..., Any], model: ModelReward | None = None, **overrides: Any) -> Completions:
    """Four prompts, each completed with "1" and "12" and the end token, judged by ``reward``."""
    session = tiny_session(**overrides)

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
        )

    rows, prompts, _ = make_source(session, session.config).take(DataPosition(), 4)
    rows = [row for row in rows for _ in range(2)]
    with RewardRunner([("reward", reward, 2.0)], workers=1) as runner:
        key = session.key(ROLLOUT_KEY)
        return complete(session, generate, {}, repeat_prompts(prompts, 2), rows, runner, key, 0, model_reward=model)


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
