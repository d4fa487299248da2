"""A stage's step: dynamic sampling, what it counts, references that stay or move, and the permuted control."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.collect import collect
from rljax.compiles import CompileCounter
from rljax.data.batches import DataPosition
from rljax.rewards.base import Score, Span
from rljax.stage_state import abstract_saved
from rljax.stage_steps import online_step
from rljax.stages import Stage
from rljax.steps import TrainState
from rljax.types import FINISH_END, Prompts, Rollout
from tests.truths import digit_share, main_stage, tiny_session

RIGHT, WRONG, END = 4, 5, 2  # "1", "2" and the end token
NO_WEIGHTS = TrainState(np.int32(5), {"policy": {}}, (), ())


def is_one(prompt: str, completion: str) -> Score:
    right = completion == "1"
    return Score(10.0 if right else 3.0, correct=right, parts={"bonus": 7.0} if right else {})


def scripted(stage: Stage, kinds: str) -> None:
    """Completions by prompt instead of a model: a group is (a)ll right, (n)one right or (m)ixed, first sample right."""

    def generate(params: Any, prompts: Prompts, key: Any, version: Any) -> Rollout:
        kind = np.asarray([kinds[i % len(kinds)] for i in np.asarray(prompts.prompt_id)])
        right = (kind == "a") | ((kind == "m") & (np.asarray(prompts.sample_id) == 0))
        budget = np.zeros((len(kind), stage.config.rollout.max_new_tokens), np.int32)
        budget[:, 0], budget[:, 1] = np.where(right, RIGHT, WRONG), END
        sampled = budget > 0
        nothing = np.zeros(prompts.tokens.shape)
        return Rollout(
            tokens=jnp.asarray(np.hstack([prompts.tokens, budget])),
            valid=jnp.asarray(np.hstack([prompts.valid, sampled])),
            loss_mask=jnp.asarray(np.hstack([nothing, sampled]).astype(bool)),
            behavior_logprobs=jnp.asarray(np.hstack([nothing, np.where(sampled, -0.5, 0.0)])),
            support=jnp.asarray(np.hstack([nothing, np.zeros(sampled.shape)]) - np.inf),
            finish_reason=jnp.full(len(kind), FINISH_END),
            prompt_id=prompts.prompt_id,
            sample_id=prompts.sample_id,
            group_id=prompts.prompt_id,
            step_version=jnp.full(len(kind), version),
        )

    stage.generate = generate


@pytest.fixture
def mixing() -> Any:
    """``mixing(kinds, max_rounds)``: a stage of 4 prompts x 2 samples a step that keeps mixed groups only."""

    def make(kinds: str, max_rounds: int) -> Stage:
        session = tiny_session(
            **{
                "rollout.prompts_per_step": 4,
                "rollout.keep_groups": "mixed",
                "rollout.max_rounds": max_rounds,
                "algo.kl_coef": 0.0,
            }
        )
        stage = main_stage(session, is_one)
        stage.source.shuffle = False  # prompt i is the i-th drawn
        scripted(stage, kinds)
        return stage

    return make


def prompt_ids(done: Any) -> list[int]:
    return done.host.prompt_id.tolist()


def test_mixed_groups_are_kept_in_data_order_until_there_are_enough(mixing: Any) -> None:
    """Of prompts 0 to 11 the mixed ones are 2, 3, 6, 7, 10, 11: the second round has what was missing."""
    done, position, metrics = collect(mixing("anmm", 5), NO_WEIGHTS, DataPosition(), 0)
    assert prompt_ids(done) == [2, 2, 3, 3, 6, 6, 7, 7]
    assert done.host.sample_id.tolist() == [0, 1] * 4
    assert position == DataPosition(0, 8)
    np.testing.assert_array_equal(done.correct, [1, 0] * 4)
    np.testing.assert_array_equal(done.rewards, [10, 3] * 4)
    np.testing.assert_array_equal(done.parts["reward"], done.rewards)
    np.testing.assert_array_equal(done.parts["reward/bonus"], [7, np.nan] * 4)
    np.testing.assert_array_equal(np.asarray(done.rollout.tokens), done.host.tokens)
    np.testing.assert_array_equal(done.host.step_version, 5)
    assert done.host.loss_mask.sum(axis=1).tolist() == [2] * 8
    for i, sample in done.samples.items():
        assert sample.completion == ("1" if done.correct[i] else "2")
        assert sample.row == done.rows[i] and sample.prompt == done.rows[i]["prompt"]
    assert sorted(done.samples) == list(range(8))
    assert metrics["train/rounds"] == 2
    assert metrics["train/groups_kept"] == 4 / 8


def test_metrics_are_of_everything_that_was_sampled(mixing: Any) -> None:
    """Two rounds of all-right, none-right and two mixed groups: what was kept alone would say nothing of the policy."""
    metrics = collect(mixing("anmm", 5), NO_WEIGHTS, DataPosition(), 0)[2]
    assert metrics["train/groups_all_right"] == metrics["train/groups_all_wrong"] == 1 / 4
    assert metrics["train/correct"] == 0.5 and metrics["train/reward"] == 6.5
    assert metrics["train/reward/reward"] == 6.5
    assert metrics["train/reward/reward/bonus"] == 7  # of the rows that have it
    assert metrics["train/completion_length"] == 2
    np.testing.assert_allclose(metrics["train/perplexity"], np.exp(0.5))
    assert metrics["rollout/decode_steps"] == 4  # two rounds of two
    assert metrics["rollout/occupied_slot_share"] == 1


def test_surplus_groups_are_consumed(mixing: Any) -> None:
    """6 of the 8 drawn are mixed: 0, 1, 2 and 4 train, 5 and 6 are gone."""
    stage = mixing("mmmnmmmn", 5)
    done, position, metrics = collect(stage, NO_WEIGHTS, DataPosition(), 0)
    assert prompt_ids(done)[::2] == [0, 1, 2, 4]
    assert metrics["train/groups_kept"] == 6 / 8
    assert prompt_ids(collect(stage, NO_WEIGHTS, position, 1)[0])[::2] == [8, 9, 10, 12]


def test_missing_groups_are_filled_with_masked_rows(mixing: Any) -> None:
    """One round, one mixed group: three others stand there so that shapes stay, without a token that trains."""
    stage = mixing("aanm", 1)
    done, position, metrics = collect(stage, NO_WEIGHTS, DataPosition(), 0)
    assert prompt_ids(done)[:2] == [3, 3] and len(set(prompt_ids(done))) == 4
    assert done.host.loss_mask.any(axis=1).tolist() == [True] * 2 + [False] * 6
    np.testing.assert_array_equal(np.asarray(done.rollout.loss_mask), done.host.loss_mask)
    assert sorted(done.samples) == [0, 1]
    assert metrics["train/groups_kept"] == 1 / 4 and metrics["train/groups_all_right"] == 1 / 2
    assert position == DataPosition(0, 4)


def test_groups_without_a_verdict_are_judged_by_their_rewards(mixing: Any) -> None:
    stage = mixing("anmm", 5)
    stage.runner = main_stage(stage.session, lambda prompt, completion: float(completion == "1")).runner
    done, _, metrics = collect(stage, NO_WEIGHTS, DataPosition(), 0)
    assert prompt_ids(done)[::2] == [2, 3, 6, 7]
    assert "train/correct" not in metrics


def test_rewards_of_tokens_come_along_from_every_round(mixing: Any) -> None:
    """Only prompts of the second round (4 to 7) get spans: those kept of the first have zeros beside them."""
    stage = mixing("anmm", 5)
    second = {row["prompt"] for row in stage.source.rows[4:8]}

    def judged(prompt: str, completion: str) -> Score:
        spans = (Span(0, 1, 0.5),) if prompt in second else ()
        return is_one(prompt, completion)._replace(spans=spans)

    stage.runner = main_stage(stage.session, judged).runner
    done, _, _ = collect(stage, NO_WEIGHTS, DataPosition(), 0)
    assert prompt_ids(done)[::2] == [2, 3, 6, 7]
    assert done.dense is not None
    np.testing.assert_allclose(done.dense.sum(axis=1), [0.0] * 4 + [0.5] * 4)


def test_every_group_all_right_trains_nothing_and_counts_as_a_step(mixing: Any) -> None:
    stage = mixing("a", 2)
    before = jax.device_get(stage.session.base_params())
    state = stage.start({"policy": stage.session.base_params()})
    state, position, metrics, done = online_step(stage, state, DataPosition(), 0)
    assert position == DataPosition(0, 8) and not done.host.loss_mask.any()
    assert metrics["train/loss"] == metrics["train/grad_norm/policy"] == metrics["train/skipped"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params["policy"], before)


def test_all_groups_are_kept_unless_asked(mixing: Any) -> None:
    stage = mixing("anmm", 5)
    rollout = dataclasses.replace(stage.config.rollout, keep_groups="all")
    stage.config = dataclasses.replace(stage.config, rollout=rollout)
    done, position, metrics = collect(stage, NO_WEIGHTS, DataPosition(), 0)
    assert prompt_ids(done)[::2] == [0, 1, 2, 3] and position == DataPosition(0, 4)
    assert "train/rounds" not in metrics


# -- references and the permuted control, on one real stage


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """A step with a reference, plain and with permuted rewards, from the same start."""
    session = tiny_session(**{"optim.learning_rate": 0.03, "algo.kl_coef": 0.1})
    stage = main_stage(session, digit_share)
    seen: list[np.ndarray] = []
    targets = stage.program("targets", 8)

    def watched(state: Any, experience: Any) -> Any:
        seen.append(np.asarray(experience.rewards))
        return targets(state, experience)

    stage._programs["targets", 8] = watched
    start = jax.device_get(stage.reference)
    plain = online_step(stage, stage.start({"policy": session.base_params()}), DataPosition(), 0)
    permute = dataclasses.replace(stage.config.reward, permute=True)
    stage.config = dataclasses.replace(stage.config, reward=permute)
    permuted = online_step(stage, stage.start({"policy": session.base_params()}), DataPosition(), 0)
    return {"stage": stage, "start": start, "plain": plain, "permuted": permuted, "rewards": seen}


def test_the_reference_is_the_start_to_the_bit(trained: dict[str, Any]) -> None:
    jax.tree.map(np.testing.assert_array_equal, trained["stage"].reference, trained["start"])
    moved = jax.device_get(trained["plain"].state.params["policy"])
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(trained["start"]), strict=True))
    # At the start policy and reference are one: no divergence but rounding.
    assert abs(trained["plain"].metrics["train/kl_per_completion"]) < 1e-4


def test_permuted_rewards_are_the_same_numbers_elsewhere(trained: dict[str, Any]) -> None:
    plain, permuted = trained["rewards"]
    done = trained["permuted"].completions
    np.testing.assert_array_equal(trained["plain"].completions.host.tokens, done.host.tokens)
    np.testing.assert_allclose(plain, done.rewards, rtol=1e-6)  # what was measured is what is reported
    assert sorted(permuted.tolist()) == sorted(plain.tolist())
    groups = plain.reshape(-1, 2), permuted.reshape(-1, 2)
    assert sorted(map(sorted, groups[0].tolist())) != sorted(map(sorted, groups[1].tolist()))  # across groups


def test_a_reference_that_follows_the_policy(trained: dict[str, Any]) -> None:
    stage, state = trained["stage"], trained["plain"].state
    fixed, start, config = stage.reference, trained["start"], stage.config
    policy = jax.device_get(state.params["policy"])
    stage.update_reference(state, 1)
    assert stage.reference is fixed and not stage.moving_reference

    stage.config = dataclasses.replace(config, reference_ema=0.75)
    stage.update_reference(state, 1)
    expected = jax.tree.map(lambda r, p: 0.75 * r + 0.25 * p, start, policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), stage.reference, expected)

    stage.config = dataclasses.replace(config, reference_ema=0.75, reference_reset_steps=3)  # TR-DPO's soft update
    before = jax.device_get(stage.reference)
    for step, decay in ((4, 1.0), (6, 0.75)):
        stage.update_reference(state, step)
        expected = jax.tree.map(lambda r, p, d=decay: d * r + (1 - d) * p, before, policy)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), stage.reference, expected)

    stage.config = dataclasses.replace(config, reference_reset_steps=3)
    compiled = CompileCounter()
    for step, is_policy in ((4, False), (6, True)):
        stage.update_reference(state, step)
        same = jax.tree.map(np.array_equal, jax.device_get(stage.reference), policy)
        assert all(jax.tree.leaves(same)) == is_policy
    compiled.close()
    assert not compiled.count  # the copy is the first reference's program
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_a_running_mean_keeps_its_bits_in_bfloat16() -> None:
    """Decay .999: a thousandth of the way is less than a bfloat16 can show."""
    session = tiny_session(compute_dtype="bfloat16", reference_ema=0.999)
    stage = main_stage(session, digit_share)
    state = stage.start({"policy": jax.tree.map(lambda x: 1.5 * x, session.base_params())})
    start = jax.device_get(stage.reference)
    stage.update_reference(state, 1)
    expected = jax.tree.map(lambda r: (0.999 + 0.0015) * r, start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), stage.reference, expected)
    shapes = abstract_saved(stage)["reference"]
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {x.dtype for x in jax.tree.leaves(stage.reference)}
