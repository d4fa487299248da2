"""What online losses share: each surrogate, correction, KL and covariance choice by hand, through GRPO's file."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos import grpo, policy
from rljax.losses.kl import k2, k3
from rljax.types import Experience, Outputs
from tests.algos.rollouts import completion, experience, on_completion
from tests.algos.tables import terms_of

SETTINGS: dict[str, Any] = {
    "kl_coef": 0.0,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "advantage_mean": "group",
    "advantage_std": "none",
    "aggregation": "sequence_mean_token_mean",
}
# Two rows of one prompt, advantages 1 and -1; their ratios: 1.5, 1 and .5, 2.
LOG_RATIOS = np.log([[1.5, 1.0], [0.5, 2.0]])


def algorithm(group_size: int = 2, **changes: Any) -> Any:
    return grpo.make(grpo.Config(**{**SETTINGS, **changes}), group_size=group_size, max_new_tokens=4)


def pair(**scored: Any) -> Experience:
    return experience([2.0, 0.0], [2, 2], **scored)


def losses(algo: Any, log_ratios: Any = LOG_RATIOS, exp: Experience | None = None) -> dict[str, Any]:
    _, batch = algo.targets(algo.init(), exp or pair())
    return terms_of(algo, outputs_of(-1 + np.asarray(log_ratios)), batch, algo.init())


def outputs_of(logprobs: Any) -> Outputs:
    return Outputs(on_completion(logprobs), on_completion(np.full(np.shape(logprobs), 2.0)))


# -- surrogates


def gate(ratio: float, tau: float) -> float:
    """SAPO's soft clip, 4/τ σ(τ(ρ - 1))."""
    return 4 / tau / (1 + np.exp(-tau * (ratio - 1)))


S1, S2 = 1.5**0.5, 1.0  # geometric means of the ratios of each row
EXPECTED = {
    # A = 1: min(1.5, 1.28), 1; A = -1: max(.5, .8), 2.
    "clipped": (-(1.28 + 1) / 2 + (0.8 + 2) / 2) / 2,
    # The clip sees the rows' own ratios, 1.2247 (< 1.28) and 1.
    "gspo": (-S1 + S2) / 2,
    "gspo_token": (-S1 + S2) / 2,
    # sg[clip(ρ)] A log π, with log π = -1 + log ρ.
    "cispo": (-(1.28 * (-1 + np.log(1.5)) - 1) / 2 + (0.8 * (-1 + np.log(0.5)) + 1.28 * (-1 + np.log(2))) / 2) / 2,
    # log ρ at most .28 where A > 0, at least -.2 where A < 0.
    "gmpo": (-np.exp((0.28 + 0) / 2) + np.exp((-0.2 + np.log(2)) / 2)) / 2,
    "sapo": (-(gate(1.5, 1) + gate(1, 1)) / 2 + (gate(0.5, 1.05) + gate(2, 1.05)) / 2) / 2,
    "reinforce": (-(-1 + np.log(1.5) - 1) / 2 + (-1 + np.log(0.5) - 1 + np.log(2)) / 2) / 2,
}


@pytest.mark.parametrize("surrogate", EXPECTED)
def test_each_surrogate_by_hand(surrogate: str) -> None:
    np.testing.assert_allclose(losses(algorithm(surrogate=surrogate))["policy"], EXPECTED[surrogate], rtol=1e-5)


@pytest.mark.parametrize("surrogate", EXPECTED)
def test_on_policy_every_surrogate_has_the_gradient_of_reinforce(surrogate: str) -> None:
    """At ratio 1: -A / (rows · tokens) at each token."""
    algo = algorithm(surrogate=surrogate)
    _, batch = algo.targets(algo.init(), pair())

    def loss(x: jax.Array) -> jax.Array:
        return terms_of(algo, Outputs(x, jnp.zeros(x.shape)), batch, algo.init())["total"]

    gradient = completion(jax.grad(loss)(on_completion(np.full((2, 2), -1.0))))
    np.testing.assert_allclose(gradient, [[-0.25, -0.25], [0.25, 0.25]], rtol=1e-5)


def test_clip_fractions_are_of_what_the_clip_sees() -> None:
    plain = losses(algorithm())
    assert float(plain["clip_fraction_high"]) == float(plain["clip_fraction_low"]) == 0.25
    sequences = losses(algorithm(surrogate="gspo", clip_high=0.2))  # 1.2247 is above 1.2: both of its tokens
    assert (float(sequences["clip_fraction_high"]), float(sequences["clip_fraction_low"])) == (0.5, 0.0)
    assert "clip_fraction_low" not in losses(algorithm(surrogate="sapo"))


# -- corrections


def stale(**changes: Any) -> tuple[Any, Experience]:
    """Weights proximal / behaviour: 4, 1 in the first row and .5, .25 in the second."""
    return algorithm(**changes), pair(proximal_logprobs=-1 + np.log([[4.0, 1.0], [0.5, 0.25]]))


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ({"correction": "decoupled"}, [[4, 1], [0.5, 0.25]]),
        ({"correction": "truncated", "correction_high": 2.0}, [[2, 1], [0.5, 0.25]]),
        ({"correction": "masked", "correction_high": 2.0}, [[0, 1], [0.5, 0.25]]),
        ({"correction": "two_sided", "correction_low": 0.4, "correction_high": 2.0}, [[0, 1], [0.5, 0]]),
        # Products of a row, 4 and .125, and geometric means, 2 and .125 ** .5.
        ({"correction": "truncated", "correction_of": "sequence"}, [[2, 2], [0.125, 0.125]]),
        ({"correction": "decoupled", "correction_of": "geometric"}, [[2, 2], [0.125**0.5] * 2]),
    ],
)
def test_corrections_by_hand(changes: dict[str, Any], weights: list) -> None:
    """The ratio is current over proximal: with the current policy at the proximal one the losses are -A w."""
    algo, exp = stale(**changes)
    assert "proximal_logprobs" in algo.needs
    log_ratios = completion(exp.proximal_logprobs) + 1
    got = losses(algo, log_ratios, exp)
    w = np.asarray(weights)
    np.testing.assert_allclose(got["policy"], (-w[0].mean() + w[1].mean()) / 2, rtol=1e-5)
    np.testing.assert_allclose(got["correction_weight"], w.mean(), rtol=1e-5)
    assert float(got["clip_fraction_high"]) == 0


def test_the_decoupled_clip_is_around_the_proximal_policy() -> None:
    """Ratios to the proximal policy 1.5, 1, .5, 2 as without a correction, each loss times its weight."""
    algo, exp = stale(correction="decoupled")
    got = losses(algo, LOG_RATIOS + completion(exp.proximal_logprobs) + 1, exp)
    expected = (-(4 * 1.28 + 1) / 2 + (0.5 * 0.8 + 0.25 * 2) / 2) / 2
    np.testing.assert_allclose(got["policy"], expected, rtol=1e-5)


# -- KL


@pytest.mark.parametrize(
    ("estimator", "value"),
    [
        # d = log π - log ref is .5, 0 and -.5, .25; the tokens were sampled at ratio 1.
        ("k2", (0.125 + 0 + 0.125 + 0.03125) / 4),
        ("k3", (np.exp(-0.5) - 0.5 + np.exp(0.5) - 1.5 + np.exp(-0.25) - 0.75) / 4),
        ("k4", (0.5 + 0 - 0.5 + 0.25) / 4),
        ("straight_through", (np.exp(-0.5) - 0.5 + np.exp(0.5) - 1.5 + np.exp(-0.25) - 0.75) / 4),
    ],
)
def test_the_kl_in_the_loss_by_hand(estimator: str, value: float) -> None:
    exp = pair(ref_logprobs=-1 - np.array([[0.5, 0.0], [-0.5, 0.25]]))
    got = losses(algorithm(kl_coef=0.1, kl_estimator=estimator), np.zeros((2, 2)), exp)
    np.testing.assert_allclose(got["kl"], value, rtol=1e-5)
    np.testing.assert_allclose(got["total"] - got["policy"], 0.1 * value, rtol=1e-5)


def test_straight_through_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    exp = pair(ref_logprobs=-1 - np.array([[0.5, 0.0], [-0.5, 0.25]]))
    algo = algorithm(kl_coef=1.0, kl_estimator="straight_through", surrogate="reinforce", advantage_mean="none")
    _, batch = algo.targets(algo.init(), exp._replace(rewards=jnp.zeros(2)))

    def loss(x: jax.Array) -> jax.Array:
        return terms_of(algo, Outputs(x, jnp.zeros(x.shape)), batch, algo.init())["total"]

    x = on_completion(np.full((2, 2), -1.0))
    ref = completion(exp.ref_logprobs)
    np.testing.assert_allclose(loss(x), k3(jnp.full((2, 2), -1.0), ref).mean(), rtol=1e-5)
    expected = jax.grad(lambda y: k2(y, ref).mean())(jnp.full((2, 2), -1.0))
    np.testing.assert_allclose(completion(jax.grad(loss)(x)), expected, rtol=1e-5, atol=1e-7)


def test_the_kl_in_the_reward_moves_the_advantages_and_not_the_loss() -> None:
    """KL of the rows: .1 · (.5 + 0) and .1 · (-.5 + .25): rewards 1.95 and .025, mean .9875."""
    exp = pair(ref_logprobs=-1 - np.array([[0.5, 0.0], [-0.5, 0.25]]))
    algo = algorithm(kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    _, batch = algo.targets(algo.init(), exp)
    np.testing.assert_allclose(completion(batch["advantages"])[:, 0], [0.9625, -0.9625], rtol=1e-5)
    assert "ref_logprobs" not in batch and "kl" not in losses(algo, exp=exp)


# -- covariance


def covaried(key: int = 0, **changes: Any) -> tuple[dict[str, Any], np.ndarray]:
    """Centred log-probs .75, .25, -.75, -.25 by advantages 1, 1, -1, -1: covariances .75, .25, .75, .25."""
    algo = algorithm(covariance_share=0.5, covariance_bounds=(0.0, 0.5), **changes)
    assert "current_logprobs" in algo.needs
    _, batch = algo.targets(algo.init(), pair())
    current = on_completion([[-0.25, -0.75], [-1.75, -1.25]])
    _, prepared, _ = algo.prepare(algo.init(), {**batch, "current_logprobs": current}, jax.random.key(key))
    return prepared, completion(prepared["selected"])


def test_kl_cov_takes_the_highest_and_adds_their_log_ratio() -> None:
    prepared, selected = covaried(covariance="kl_cov", covariance_kl_coef=0.5)
    np.testing.assert_array_equal(selected, [[True, False], [True, False]])
    algo = algorithm(covariance="kl_cov", covariance_kl_coef=0.5)
    terms = algo.loss(outputs_of(-1 + LOG_RATIOS), prepared)
    # Rows' means of what |log ρ| adds: .5 log 1.5 / 2 and .5 log 2 / 2.
    plain = 2 * EXPECTED["clipped"]
    np.testing.assert_allclose(terms["policy"].numerator, plain + (np.log(1.5) + np.log(2)) / 4, rtol=1e-5)


def test_clip_cov_stops_gradients_of_random_tokens_between_its_bounds() -> None:
    """Only the two of .25 lie in (0, .5); half of four tokens may go: both. Ratios to the sampler, exp(±.25), clip
    neither."""
    prepared, selected = covaried(covariance="clip_cov", clip_high=0.4, clip_low=0.3)
    np.testing.assert_array_equal(selected, [[False, True], [False, True]])
    algo = algorithm(covariance="clip_cov")

    def loss(x: jax.Array) -> jax.Array:
        return algo.loss(Outputs(x, jnp.zeros(x.shape)), prepared)["policy"].numerator

    gradient = completion(jax.grad(loss)(on_completion(np.full((2, 2), -1.0))))
    np.testing.assert_allclose(gradient, [[-0.5, 0], [0.5, 0]], rtol=1e-5)


# -- GRPO's own


def grouped(rewards: list[float], lengths: list[int], **changes: Any) -> np.ndarray:
    algo = algorithm(**changes)
    _, batch = algo.targets(algo.init(), experience(rewards, lengths))
    return completion(batch["advantages"])[:, 0]


def test_opo_weighs_the_baseline_by_length() -> None:
    """(3 · 1 + 1 · 5) / 4 = 2 against the plain mean of 3."""
    np.testing.assert_allclose(grouped([1.0, 5.0], [3, 1], advantage_mean="by_length"), [-1, 3], rtol=1e-6)


def test_gpg_makes_up_for_groups_without_a_signal() -> None:
    """One of two groups is mixed: α = 4 / 2."""
    got = grouped([1.0, 0.0, 1.0, 1.0], [1, 1, 1, 1], advantage_scale="mixed_groups", surrogate="reinforce")
    np.testing.assert_allclose(got, [1, -1, 0, 0], rtol=1e-6)


def test_gpg_as_verl_counts_rewards_that_are_not_0() -> None:
    """Three of four: α = 4 / 3."""
    got = grouped([1.0, 0.0, 1.0, 1.0], [1, 1, 1, 1], advantage_scale="nonzero_rewards", surrogate="reinforce")
    np.testing.assert_allclose(got, [0.5 * 4 / 3, -0.5 * 4 / 3, 0, 0], rtol=1e-6)


def test_a_sequence_mean_may_count_rows_that_it_leaves_out() -> None:
    """Of two rows the second is cut off and left out: the mean is over one row, or as TRL has it over two."""
    exp = experience([2.0, 0.0], [2, 2], finished=[True, False])
    means = [losses(algorithm(mask_truncated=True, count_empty=count), exp=exp)["policy"] for count in (False, True)]
    np.testing.assert_allclose(means[0], 2 * means[1], rtol=1e-6)
    assert means[0] != 0
    with pytest.raises(ValueError, match="count_empty is of means over sequences"):
        algorithm(aggregation="token_mean", count_empty=True)


def test_truncated_rows_may_leave_the_statistics() -> None:
    """Rewards 4, 2, 0, the last cut off (the budget is 4): the mean is 3 without it, 2 with it."""
    settings: dict[str, Any] = {"group_size": 3, "mask_truncated": True}
    for inside, expected in ((True, [2.0, 0.0]), (False, [1.0, -1.0])):
        algo = algorithm(truncated_in_statistics=inside, **settings)
        exp = experience([4.0, 2.0, 0.0], [2, 2, 2], finished=[True, True, False])
        batch = algo.targets(algo.init(), exp)[1]
        np.testing.assert_allclose(completion(batch["advantages"])[:2, 0], expected, rtol=1e-6)
        assert not np.asarray(batch["loss_mask"])[2].any()


@pytest.mark.parametrize(
    ("surrogate", "free"),
    [("clipped", [[False, True], [False, True]]), ("gmpo", [[True, True], [False, True]]), ("cispo", np.ones((2, 2)))],
)
def test_clip_cov_may_choose_what_the_surrogate_has_not_clipped(surrogate: str, free: Any) -> None:
    """Log ratios .25, 0 (A = 1) and -.25, 0 (A = -1), edges ±.24: e^.25 - 1 = .28 is past 1 + .24, 1 - e^-.25 = .22 is
    not past 1 - .24 but is past the log's -.24; gmpo's upper edge is here the log's .26."""
    config = grpo.Config(
        **{**SETTINGS, "surrogate": surrogate, "clip_low": 0.24, "clip_high": 0.26 if surrogate == "gmpo" else 0.24}
    )
    log_ratios = jnp.array([[0.25, 0.0], [-0.25, 0.0]])
    if surrogate == "clipped":
        log_ratios = log_ratios.at[1, 0].set(-0.28)  # e^-.28 = .756 is past .76
    advantages, mask = jnp.array([[1.0, 1.0], [-1.0, -1.0]]), jnp.ones((2, 2), bool)
    low, high = policy._clipped(config, log_ratios, jnp.zeros((2, 2)), advantages, mask)
    np.testing.assert_array_equal(~(low | high), np.asarray(free, bool))


def test_a_filled_up_group_is_not_in_gpg_s_count() -> None:
    """The second group fills the step up and has no tokens: all rows that count are mixed, α = 1."""
    got = grouped([1.0, 0.0, 7.0, 0.0], [1, 1, 0, 0], advantage_scale="mixed_groups")
    np.testing.assert_allclose(got[:2], [0.5, -0.5], rtol=1e-6)


def test_the_overlong_penalty_is_in_the_reward() -> None:
    """Budget 4, buffer 2: lengths 2, 3, 4 lose 0, 1/2, 1 of the factor."""
    got = grouped([1.0, 1.0, 1.0], [2, 3, 4], group_size=3, overlong_buffer=2, overlong_factor=1.0)
    np.testing.assert_allclose(got, [0.5, 0, -0.5], atol=1e-6)


@pytest.mark.parametrize("mean", ["group", "batch", "running", "none"])
@pytest.mark.parametrize("std", ["group", "batch", "running", "none"])
def test_the_sixteen_normalisers_against_numpy(mean: str, std: str) -> None:
    rewards = np.random.default_rng(2).normal(size=12)
    got = grouped(rewards.tolist(), [1] * 12, group_size=4, advantage_mean=mean, advantage_std=std)
    groups = rewards.reshape(3, 4)
    means = {"group": groups.mean(axis=1, keepdims=True), "batch": rewards.mean(), "running": rewards.mean(), "none": 0}
    spread = rewards.std(ddof=1)
    stds = {"group": groups.std(axis=1, ddof=1, keepdims=True), "batch": spread, "running": spread, "none": 1}
    np.testing.assert_allclose(got, ((groups - means[mean]) / stds[std]).ravel(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surrogate": "gspo", "aggregation": "token_mean"}, "of whole sequences"),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, "no gradient in the loss"),
        ({"sapo_tau": (1.0,)}, "two numbers each"),
        ({"advantage_mean": "by_length", "advantage_std": "batch"}, "divides by nothing"),
        ({"advantage_mean": "by_length", "group_size": 1}, "group_size to 2 or more"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, "surrogate 'cispo' has none"),
        ({"dual_clip": 0.2}, "dual_clip is 0.2; it bounds the ratio and must be above 1"),
        ({"overlong_buffer": 10_000}, "overlong_buffer is 10000; give tokens within the budget"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm(**changes)
