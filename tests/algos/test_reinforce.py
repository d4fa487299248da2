"""RLOO, REINFORCE++ and ReMax by hand."""

from typing import Any

import jax
import numpy as np
import pytest

from rljax.algos import reinforce, rloo
from rljax.types import Experience, Outputs
from tests.algos.rollouts import completion, experience, on_completion
from tests.algos.tables import terms_of

POLICY: dict[str, Any] = {"kl_coef": 0.1, "clip_low": 0.2, "clip_high": 0.2}


def leaving_one_out(group_size: int = 3, **changes: Any) -> Any:
    settings = {**POLICY, "surrogate": "reinforce", "aggregation": "sequence_mean_token_sum", **changes}
    return rloo.make(rloo.Config(**settings), group_size=group_size, max_new_tokens=4)


def plus_plus(group_size: int = 2, **changes: Any) -> Any:
    settings = {"gamma": 1.0, "baseline": "none", "whiten_advantages": True, "aggregation": "token_mean", **changes}
    return reinforce.make(reinforce.Config(**POLICY, **settings), group_size=group_size, max_new_tokens=4)


def targets(algo: Any, exp: Experience) -> dict[str, Any]:
    return algo.targets(algo.init(), exp)[1]


# -- RLOO


def three() -> Experience:
    """One prompt, rewards 1, 2, 6; k1 is .5 a token, so the KL of the rows is 1, .5 and .5 nats."""
    return experience([1.0, 2.0, 6.0], [2, 1, 1], ref_logprobs=np.full((3, 2), -1.5))


def test_the_baseline_is_the_mean_of_the_others_kl_included() -> None:
    """Rewards less .1 KL: .9, 1.95, 5.95; the others' means 3.95, 3.425, 1.425."""
    advantages = completion(targets(leaving_one_out(), three())["advantages"])
    np.testing.assert_allclose(advantages, [[-3.05, -3.05], [-1.475, 0], [4.525, 0]], rtol=1e-5)


def test_the_loss_is_minus_advantage_times_the_log_prob_of_the_sequence() -> None:
    """Log-probs -1, -2 | -1 | -3: (3.05 · -3 + 1.475 · -1 - 4.525 · -3) / 3."""
    algo = leaving_one_out()
    out = Outputs(on_completion([[-1.0, -2.0], [-1.0, 9], [-3.0, 9]]), on_completion(np.zeros((3, 2))))
    got = terms_of(algo, out, targets(algo, three()))
    np.testing.assert_allclose(got["policy"], (3.05 * -3 + 1.475 * -1 - 4.525 * -3) / 3, rtol=1e-5)


def test_a_missing_end_costs_and_whitening_is_over_tokens() -> None:
    exp = experience([1.0, 2.0, 6.0], [2, 1, 1], finished=[True, True, False], ref_logprobs=np.full((3, 2), -1.0))
    algo = leaving_one_out(missing_end="replace", missing_end_value=-1.0)
    expected = [1 - 0.5, 2 - 0, -1 - 1.5]
    np.testing.assert_allclose(completion(targets(algo, exp)["advantages"])[:, 0], expected, rtol=1e-6)
    whitened = targets(leaving_one_out(whiten_advantages=True), three())
    tokens = completion(whitened["advantages"])[completion(whitened["loss_mask"])]
    np.testing.assert_allclose([tokens.mean(), tokens.std(ddof=1)], [0, 1], atol=1e-5)


# -- REINFORCE++


def two() -> Experience:
    return experience([1.0, 3.0], [2, 1], ref_logprobs=np.full((2, 2), -1.5))


def test_returns_to_go_of_shaped_rewards_are_whitened_over_tokens() -> None:
    """Token rewards -.05, .95 | 2.95: returns .9, .95 | 2.95 whose mean is 1.6."""
    known = np.array([0.9, 0.95, 2.95])
    expected = (known - known.mean()) / known.std(ddof=1)
    batch = targets(plus_plus(), two())
    np.testing.assert_allclose(completion(batch["advantages"])[completion(batch["loss_mask"])], expected, rtol=1e-5)


def test_its_baseline_form_centres_the_scores_first() -> None:
    """Scores less their mean 2 are -1, 1: returns -1.1, -1.05 | .95."""
    known = np.array([-1.1, -1.05, 0.95])
    batch = targets(plus_plus(baseline="group"), two())
    got = completion(batch["advantages"])[completion(batch["loss_mask"])]
    np.testing.assert_allclose(got, (known - known.mean()) / known.std(ddof=1), rtol=1e-5)


def test_without_anything_it_is_reinforce_with_discounted_returns() -> None:
    batch = targets(plus_plus(whiten_advantages=False, gamma=0.5), two())
    np.testing.assert_allclose(completion(batch["advantages"]), [[-0.05 + 0.5 * 0.95, 0.95], [2.95, 0]], rtol=1e-5)


# -- ReMax


def test_the_greedy_row_is_the_baseline_and_leaves_the_batch() -> None:
    """Two prompts of three: rewards over their first row's, 2 and -1."""
    exp = experience([2.0, 5.0, 1.0, -1.0, 0.0, -3.0], [1, 2, 1, 2, 1, 2])
    algo = plus_plus(group_size=3, baseline="greedy", whiten_advantages=False)
    batch = targets(algo, exp._replace(ref_logprobs=exp.rollout.behavior_logprobs))
    assert algo.rows_per_prompt == 2
    np.testing.assert_allclose(completion(batch["advantages"]), [[3, 3], [-1, 0], [1, 0], [-2, -2]], rtol=1e-6)
    jax.tree.map(lambda x: np.testing.assert_equal(len(x), 4), batch)


@pytest.mark.parametrize("make", [leaving_one_out, lambda **k: plus_plus(baseline="greedy", **k)])
def test_one_completion_has_no_others(make: Any) -> None:
    with pytest.raises(ValueError, match=r"set rollout.group_size to 2"):
        make(group_size=1)
