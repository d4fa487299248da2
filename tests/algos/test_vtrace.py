"""V-trace on tables, and the schedule of versions that makes it necessary."""

from typing import Any

import numpy as np
import pytest

from rljax.algos import ppo, vtrace
from rljax.algos.staleness import Schedule
from rljax.types import Experience, Outputs
from tests.algos.rollouts import completion, experience, on_completion
from tests.algos.tables import terms_of

SETTINGS: dict[str, Any] = {
    "kl_coef": 0.0,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "aggregation": "token_mean",
    "value_coef": 0.5,
    "value_clip": 0.2,
    "value_loss": "squared",
    "gamma": 1.0,
    "rho_clip": 1.0,
    "c_clip": 1.0,
}


def algorithm(**changes: Any) -> Any:
    return vtrace.make(vtrace.Config(**{**SETTINGS, **changes}), group_size=1, max_new_tokens=4)


def rollout(log_weights: Any) -> Experience:
    return experience(
        [1.0],
        [3],
        proximal_logprobs=[-1 + np.asarray(log_weights)],
        values=[[0.2, 0.4, 0.6]],
        final_values=[0.8],
    )


def test_targets_and_advantages_by_hand() -> None:
    """Weights 2 (cut to 1), .5, .5; γ = 1, rewards 0, 0, 1.

    v3 = .6 + .5 (1 - .6) = .8; v2 = .4 + .5 (.6 - .4) + .5 (.8 - .6) = .6; v1 = .2 + (.4 - .2) + (.6 - .4) = .6.
    A = .5 (1 - .6), .5 (.8 - .4), .6 - .2 from the last to the first.
    """
    algo = algorithm()
    batch = algo.targets((), rollout(np.log([2, 0.5, 0.5])))[1]
    np.testing.assert_allclose(completion(batch["returns"]), [[0.6, 0.6, 0.8]], rtol=1e-5)
    np.testing.assert_allclose(completion(batch["advantages"]), [[0.4, 0.2, 0.2]], rtol=1e-5)
    out = Outputs(
        on_completion([[-1.0, -2.0, -3.0]]), on_completion([[0.0] * 3]), values=on_completion([[0.2, 0.4, 0.6]])
    )
    got = terms_of(algo, out, batch)
    policy, value = (0.4 + 2 * 0.2 + 3 * 0.2) / 3, (0.4**2 + 0.2**2 + 0.2**2) / 2 / 3
    np.testing.assert_allclose(got["total"], policy + 0.5 * value, rtol=1e-5)


def test_on_policy_it_is_the_monte_carlo_return_that_gae_has_at_lambda_1() -> None:
    exp = rollout(np.zeros(3))
    batch = algorithm().targets((), exp)[1]
    np.testing.assert_allclose(completion(batch["returns"]), [[1.0, 1.0, 1.0]], rtol=1e-6)
    shared = {name: value for name, value in SETTINGS.items() if name not in ("rho_clip", "c_clip")}
    plain = ppo.make(ppo.Config(**shared, lam=1.0, whiten_advantages="none"), group_size=1, max_new_tokens=4)
    same = plain.targets(plain.init(), exp)[1]
    for name in ("returns", "advantages"):
        np.testing.assert_allclose(completion(batch[name]), completion(same[name]), rtol=1e-6)


def test_the_weights_are_corrected_once() -> None:
    assert {"proximal_logprobs", "values"} <= algorithm().needs
    with pytest.raises(ValueError, match="corrects for the sampler itself"):
        algorithm(correction="truncated")


# -- the schedule


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_rollouts_are_as_old_as_the_lag_after_its_first_turns(lag: int) -> None:
    """The log of 20 updates, three times: a function of the number alone."""
    logs = [[Schedule(lag).turn(n) for n in range(20)] for _ in range(3)]
    assert logs[0] == logs[1] == logs[2]
    assert [turn.staleness for turn in logs[0]] == [min(n, lag) for n in range(20)]
    assert [turn.trained_from for turn in logs[0]] == list(range(20))


def test_one_behind_is_cleanba_s() -> None:
    """The actor fetches before its first rollout, skips its second fetch, then fetches every time."""
    schedule = Schedule(1)
    assert [schedule.turn(n).generated_by for n in range(6)] == [0, 0, 1, 2, 3, 4]
    assert [schedule.fetches(n) for n in range(5)] == [True, False, True, True, True]
    assert all(Schedule(0).fetches(n) for n in range(5))


def test_versions_are_kept_until_nobody_reads_them() -> None:
    assert list(Schedule(0).kept_versions(7)) == [7]
    assert list(Schedule(2).kept_versions(7)) == [5, 6, 7]
    assert list(Schedule(2).kept_versions(0)) == [0]
    with pytest.raises(ValueError, match="lag is -1"):
        Schedule(-1)
