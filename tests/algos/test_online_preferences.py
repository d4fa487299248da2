"""Online DPO, XPO and Nash-MD: which completions make a pair, and their losses by hand."""

from typing import Any

import jax
import numpy as np
import pytest

from rljax.algos import dpo, nash_md, online_dpo, xpo
from rljax.losses.preferences import dpo_loss
from rljax.types import Experience, Outputs
from tests.algos.rollouts import completion, experience, on_completion
from tests.algos.tables import terms_of


def sigma(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def scored(rewards: list[float], lengths: list[int], **more: Any) -> Experience:
    """The reference gives -1.5 at every token."""
    return experience(rewards, lengths, ref_logprobs=np.full((len(rewards), max(lengths)), -1.5), **more)


def outputs_of(sums: Any, lengths: Any) -> Outputs:
    """Log-probs whose sum over each row's tokens is given."""
    tokens = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    return Outputs(on_completion(np.where(tokens, (np.asarray(sums) / lengths)[:, None], 7.0)))


def targets(algo: Any, exp: Experience) -> dict[str, Any]:
    return algo.targets(algo.init(), exp)[1]


# -- online DPO


def online(group_size: int = 2, **changes: Any) -> Any:
    config = online_dpo.Config(**{"beta": 0.1, **changes})
    return online_dpo.make(config, group_size=group_size, max_new_tokens=4)


def test_best_and_worst_of_a_prompt_make_its_pair() -> None:
    """Of 1, 4, -2 | 0, 0, 5 the pairs are (4, -2) and (5, the first 0); lengths tell who they are."""
    batch = targets(online(3), scored([1, 4, -2, 0, 0, 5], [1, 2, 3, 1, 2, 3]))
    np.testing.assert_array_equal(completion(batch["loss_mask"]).sum(axis=1), [2, 3, 3, 1])
    np.testing.assert_array_equal(completion(batch["valid"]).sum(axis=1), [2, 3, 3, 1])
    assert online(3).unit == online(3).rows_per_prompt == 2


def test_equal_scores_make_no_pair() -> None:
    algo = online()
    batch = targets(algo, scored([1, 1, 2, 3], [2, 2, 2, 2]))
    assert completion(batch["loss_mask"]).sum() == 4
    assert float(algo.prepare((), batch, None)[2]["pairs"]) == 1


def test_a_missing_end_decides_as_the_asynchronous_study_has_it() -> None:
    exp = scored([2, 1], [1, 2], finished=[False, True])
    batch = targets(online(missing_end="replace", missing_end_value=-1.0), exp)
    np.testing.assert_array_equal(completion(batch["loss_mask"]).sum(axis=1), [2, 1])


def test_the_same_pair_gives_the_loss_of_offline_dpo() -> None:
    """Chosen -3 on two tokens, rejected -1 on one; of the reference -3 and -1.5: Δ = 0 - .5."""
    algo, exp = online(), scored([1, 0], [2, 1])
    batch, out = targets(algo, exp), outputs_of([-3.0, -1.0], [2, 1])
    got = terms_of(algo, out, batch)
    np.testing.assert_allclose(got["total"], -np.log(sigma(0.1 * -0.5)), rtol=1e-6)
    offline = dpo.make(dpo.Config(beta=0.1), group_size=1, max_new_tokens=1)
    np.testing.assert_array_equal(got["total"], terms_of(offline, out, batch)["total"])
    mask, ref = batch["loss_mask"], batch["ref_logprobs"]
    rows = [x[i : i + 1] for x in (out.logprobs, ref) for i in (0, 1)]
    np.testing.assert_allclose(got["total"], dpo_loss(*rows, mask[:1], mask[1:], beta=0.1), rtol=1e-6)


def test_where_sampling_truncates_the_whole_distribution_is_compared() -> None:
    algo = online()
    batch, whole = targets(algo, scored([1, 0], [2, 1])), outputs_of([-3.0, -1.0], [2, 1])
    cut = outputs_of([-1.0, -0.5], [2, 1])._replace(full_logprobs=whole.logprobs)
    np.testing.assert_array_equal(terms_of(algo, cut, batch)["total"], terms_of(algo, whole, batch)["total"])


# -- XPO


def exploring(**changes: Any) -> Any:
    return xpo.make(xpo.Config(**{"beta": 0.1, "alpha": 0.01, **changes}), group_size=2, max_new_tokens=4)


@pytest.mark.parametrize(("rewards", "reference_row"), [([1.0, 0.0], 1), ([0.0, 1.0], 0)])
def test_what_the_reference_wrote_is_pushed_down_won_or_lost(rewards: list[float], reference_row: int) -> None:
    """The policy's row has two tokens, the reference's one; log-probs -3 and -1."""
    algo = exploring()
    assert algo.rival_mixture == 1
    batch = targets(algo, scored(rewards, [2, 1]))
    np.testing.assert_array_equal(batch["from_reference"], np.arange(2) == reference_row)
    lengths = [2, 1] if reference_row else [1, 2]
    sums = [-3.0, -1.0] if reference_row else [-1.0, -3.0]
    got = terms_of(algo, outputs_of(sums, lengths), batch)
    delta = 0.1 * -0.5 * (1 if reference_row else -1)
    np.testing.assert_allclose(got["total"], -np.log(sigma(delta)) + 0.01 * -1, rtol=1e-5)
    np.testing.assert_allclose(got["exploration"], -1, rtol=1e-6)


def test_a_tie_prefers_nothing_and_explores_still() -> None:
    """Two pairs, the second of equal scores; the reference's completions have log-probs -1 and -5, mean -3.

    Of the tie the reference's row comes first."""
    algo = exploring()
    batch = targets(algo, scored([1.0, 0.0, 2.0, 2.0], [2, 1, 2, 1]))
    got = terms_of(algo, outputs_of([-3.0, -1.0, -5.0, -3.0], [2, 1, 1, 2]), batch)
    np.testing.assert_allclose(got["preference"], -np.log(sigma(0.1 * -0.5)), rtol=1e-5)  # of the first alone
    np.testing.assert_allclose(got["exploration"], -3, rtol=1e-6)
    np.testing.assert_allclose(got["total"], got["preference"] + 0.01 * -3, rtol=1e-6)


def test_without_exploration_it_is_online_dpo() -> None:
    exp, out = scored([0.0, 1.0], [2, 1]), outputs_of([-1.0, -3.0], [1, 2])
    plain, still = online(), exploring(alpha=0.0)
    np.testing.assert_array_equal(
        terms_of(still, out, targets(still, exp))["total"], terms_of(plain, out, targets(plain, exp))["total"]
    )


# -- Nash-MD


def nash(**changes: Any) -> Any:
    config = nash_md.Config(**{"beta": 0.1, "mixture": 0.125, **changes})
    return nash_md.make(config, group_size=2, max_new_tokens=4)


def gradient(algo: Any, batch: dict[str, Any]) -> np.ndarray:
    """At log-probs -1 everywhere, .5 above the reference's."""
    x = on_completion(np.full((2, 2), -1.0))
    return completion(jax.grad(lambda x: terms_of(algo, Outputs(x), batch)["total"])(x))


def test_the_rival_judges_and_leaves() -> None:
    """Scores 1 against 0 and 2 against 2: chances σ(1) and ½. Rows of two tokens and one, r = 1 and .5 nats.

    The gradient at a token is -(p - ½ - β r) over two rows.
    """
    algo, exp = nash(), scored([1, 0, 2, 2], [2, 1, 1, 2])
    assert (algo.rows_per_prompt, algo.rival_mixture) == (1, 0.125)
    batch = targets(algo, exp)
    np.testing.assert_allclose(batch["preference"], [sigma(1), 0.5], rtol=1e-6)
    first, second = -(sigma(1) - 0.5 - 0.1) / 2, -(0 - 0.05) / 2
    np.testing.assert_allclose(gradient(algo, batch), [[first, first], [second, 0]], rtol=1e-5, atol=1e-8)


def test_per_token_each_answers_for_its_own_log_ratio() -> None:
    algo = nash(per_token=True, preference="order")
    batch = targets(algo, scored([1, 0, 2, 2], [2, 1, 1, 2]))
    first, second = -(1 - 0.5 - 0.05) / 2, -(0.5 - 0.5 - 0.05) / 2
    np.testing.assert_allclose(gradient(algo, batch), [[first, first], [second, 0]], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "make", [online, lambda n: xpo.make(xpo.Config(beta=1, alpha=0), group_size=n, max_new_tokens=1)]
)
def test_a_pair_takes_two(make: Any) -> None:
    with pytest.raises(ValueError, match=r"rollout.group_size to 2"):
        make(1)


def test_a_mixture_is_a_share() -> None:
    with pytest.raises(ValueError, match="mixture within 0 to 1"):
        nash(mixture=1.5)
