"""PPO, RTO and PPO-max on tables: rewards, advantages and losses by hand, and the identities of their papers."""

from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos import ppo, ppo_max, rto
from rljax.losses.advantages import running_std
from rljax.losses.value import ema_critic_regularizer, value_bins
from rljax.types import Experience, Outputs
from tests.algos.rollouts import completion, experience, on_completion
from tests.algos.tables import terms_of

SETTINGS: dict[str, Any] = {
    "kl_coef": 0.1,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "aggregation": "token_mean",
    "value_coef": 0.1,
    "value_clip": 0.2,
    "gamma": 1.0,
    "lam": 0.5,
    "whiten_advantages": "none",
}


def algorithm(**changes: Any) -> Any:
    return ppo.make(ppo.Config(**{**SETTINGS, **changes}), group_size=1, max_new_tokens=4)


def one_row(reward: float = 1.0, finished: bool = True, **scored: Any) -> Experience:
    """Log-probs -1, of the reference -1.5: k1 is .5 at each of three tokens. Values .2, .4, .6, and .8 past the end."""
    known = {"ref_logprobs": [[-1.5] * 3], "values": [[0.2, 0.4, 0.6]], "final_values": [0.8]}
    return experience([reward], [3], finished=[finished], **{**known, **scored})


def targets(algo: Any, exp: Experience, state: Any = None) -> tuple[Any, dict[str, Any]]:
    return algo.targets(algo.init() if state is None else state, exp)


def token_rewards(exp: Experience, **changes: Any) -> np.ndarray:
    """With λ = 0 and values of 0 the advantages are the token rewards."""
    flat = exp._replace(values=jnp.zeros(exp.rollout.tokens.shape), final_values=jnp.zeros(len(exp.rewards)))
    return completion(targets(algorithm(lam=0.0, **changes), flat)[1]["advantages"])


# -- rewards


def test_the_score_stands_on_the_last_token_and_the_kl_on_all() -> None:
    np.testing.assert_allclose(token_rewards(one_row()), [[-0.05, -0.05, 0.95]], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({"missing_end": "replace", "missing_end_value": -10.0}, -10.0),  # EasyLM and Tulu
        ({"missing_end": "subtract", "missing_end_value": 1.0}, 3.0 - 1.0),  # TRL
        ({"reward_gain": 2.0, "reward_bias": -1.0}, 2 * 3.0 - 1),
        ({"missing_end": "replace", "missing_end_value": -10.0, "reward_gain": 2.0, "reward_bias": 1.0}, -19.0),
        ({"reward_clip": 2.0}, 2.0),
        ({}, 3.0),
    ],
)
def test_what_the_score_of_a_completion_without_end_token_becomes(changes: dict[str, Any], last: float) -> None:
    got = token_rewards(one_row(3.0, finished=False), kl_coef=0.0, **changes)
    np.testing.assert_allclose(got, [[0, 0, last]], rtol=1e-6)
    ended = token_rewards(one_row(3.0), kl_coef=0.0, **{k: v for k, v in changes.items() if "end" in k})
    np.testing.assert_allclose(ended, [[0, 0, 3.0]], rtol=1e-6)


def test_whitened_rewards_keep_their_mean() -> None:
    """-.05, -.05, .95: mean .85/3, squares 2 (1/3)² + (2/3)² = 2/3 over 2, so a spread of sqrt(1/3)."""
    mean, spread = 0.85 / 3, (1 / 3) ** 0.5
    expected = [[mean - 1 / 3 / spread, mean - 1 / 3 / spread, mean + 2 / 3 / spread]]
    np.testing.assert_allclose(token_rewards(one_row(), whiten_rewards=True), expected, rtol=1e-5)


def test_dense_rewards_add_up_and_fade() -> None:
    """ARES's spans: -.25 and .5 at two tokens, total .25. With 2 rollouts to fade, the second counts half."""
    exp = one_row(dense_rewards=[[-0.25, 0.0, 0.5]])
    got = token_rewards(exp, kl_coef=0.0, dense_coef=1.0)
    np.testing.assert_allclose(got, [[-0.25, 0, 1.5]], rtol=1e-6)
    algo = algorithm(kl_coef=0.0, dense_coef=1.0, dense_rollouts=2, lam=1.0)
    state, totals = algo.init(), []
    for _ in range(3):
        state, batch = targets(algo, exp, state)
        totals.append(float(completion(batch["returns"])[0, 0]))
    np.testing.assert_allclose(totals, [1.25, 1.125, 1.0], rtol=1e-6)
    assert algorithm().needs == {"entropy", "ref_logprobs", "values"}
    assert algo.needs == {"entropy", "values", "dense_rewards"}


# -- advantages


def test_advantages_and_returns_by_hand() -> None:
    """Rewards -.05, -.05, .95; δ = .95 - .6, -.05 + .6 - .4, -.05 + .4 - .2; λ = ½."""
    batch = targets(algorithm(), one_row())[1]
    np.testing.assert_allclose(completion(batch["advantages"]), [[0.3125, 0.325, 0.35]], rtol=1e-5)
    np.testing.assert_allclose(completion(batch["returns"]), [[0.5125, 0.725, 0.95]], rtol=1e-5)


def test_a_cut_completion_ends_or_goes_on() -> None:
    """γ = .5 and λ = 0: the last δ is .95 - .6, or with the value .8 behind it .95 + .5 · .8 - .6."""
    settings = {"gamma": 0.5, "lam": 0.0}
    for exp, truncated, last in (
        (one_row(finished=False), "terminal", 0.35),
        (one_row(finished=False), "bootstrap", 0.75),
        (one_row(), "bootstrap", 0.35),
    ):
        batch = targets(algorithm(truncated=truncated, **settings), exp)[1]
        np.testing.assert_allclose(completion(batch["advantages"])[0, -1], last, rtol=1e-5)


def test_a_masked_span_changes_no_number() -> None:
    """Two columns of a tool's output between the second and the third token."""
    spread = experience(
        [1.0],
        [[1, 1, 0, 0, 1]],
        ref_logprobs=[[-1.5] * 5],
        values=[[0.2, 0.4, 9, 9, 0.6]],
        final_values=[0.8],
    )
    batch, plain = targets(algorithm(), spread)[1], targets(algorithm(), one_row())[1]
    for name in ("advantages", "returns"):
        np.testing.assert_array_equal(completion(batch[name])[:, [0, 1, 4]], completion(plain[name]))


def test_whitening_over_the_rollout_or_over_each_minibatch() -> None:
    exp = experience(
        [1.0, 0.0, 2.0, 5.0],
        [3, 2, 1, 3],
        ref_logprobs=np.full((4, 3), -1.0),
        values=np.zeros((4, 3)),
        final_values=np.zeros(4),
    )
    raw = targets(algorithm(lam=1.0), exp)[1]
    mask = completion(raw["loss_mask"])
    known = completion(raw["advantages"])
    over_all = completion(targets(algorithm(lam=1.0, whiten_advantages="rollout"), exp)[1]["advantages"])
    np.testing.assert_allclose(over_all[mask], (known[mask] - known[mask].mean()) / known[mask].std(ddof=1), rtol=1e-5)
    algo = algorithm(lam=1.0, whiten_advantages="minibatch", advantage_clip=0.5)
    half = jax.tree.map(lambda x: x[:2], targets(algo, exp)[1])
    got = completion(algo.prepare(algo.init(), half, None)[1]["advantages"])
    few = known[:2][mask[:2]]
    np.testing.assert_allclose(got[mask[:2]], np.clip((few - few.mean()) / few.std(ddof=1), -0.5, 0.5), rtol=1e-5)


def test_truncated_rows_count_when_a_minibatch_is_whitened() -> None:
    """λ 1, values 0, scores 1 and 3 a token alone: mean 2, unbiased deviation sqrt 2, also with the second row cut."""
    scored = {"ref_logprobs": [[-1.0]] * 2, "values": [[0.0]] * 2, "final_values": [0.0] * 2}
    exp = experience([1.0, 3.0], [1, 1], finished=[True, False], **scored)
    algo = algorithm(lam=1.0, kl_coef=0.0, whiten_advantages="minibatch", mask_truncated=True)
    state, batch = targets(algo, exp)
    batch = algo.prepare(state, batch, jax.random.key(0))[1]
    np.testing.assert_allclose(completion(batch["advantages"])[0], -1 / np.sqrt(2), rtol=1e-5)
    np.testing.assert_array_equal(completion(batch["loss_mask"]), [[True], [False]])


def test_percentile_scaling_starts_at_its_first_spread() -> None:
    """Returns 0 to 100 by token: P95 - P5 is 90, then .99 · 90 + .01 · 180 with doubled ones. Small spreads are 1."""
    algo = algorithm(kl_coef=0.0, lam=1.0, scale_by_percentile=True)
    exp = experience(
        np.arange(101.0).tolist(), np.ones(101, int), values=np.zeros((101, 1)), final_values=np.zeros(101)
    )
    state, batch = targets(algo, exp)
    np.testing.assert_allclose(completion(batch["advantages"])[:, 0], np.arange(101) / 90, rtol=1e-5)
    state, batch = targets(algo, exp._replace(rewards=2 * exp.rewards), state)
    np.testing.assert_allclose(float(state.returns.spread), 0.99 * 90 + 0.01 * 180, rtol=1e-5)
    small = targets(algo, exp._replace(rewards=exp.rewards / 1000))[1]
    np.testing.assert_allclose(completion(small["advantages"])[:, 0], np.arange(101) / 1000, rtol=1e-5)


def test_explained_variance_by_hand() -> None:
    """Returns .5125, .725, .95 against values .2, .4, .6: both variances by NumPy; a perfect critic has 1."""
    returns, values = np.array([0.5125, 0.725, 0.95]), np.array([0.2, 0.4, 0.6])
    batch = targets(algorithm(), one_row())[1]
    np.testing.assert_allclose(batch["explained_variance"], [1 - (returns - values).var() / returns.var()], rtol=1e-4)
    perfect = one_row(values=[[0.85, 0.9, 0.95]])  # what is left of -.05, -.05, .95 at each token
    np.testing.assert_allclose(targets(algorithm(lam=1.0), perfect)[1]["explained_variance"], [1.0], rtol=1e-5)


def test_an_adaptive_coefficient_follows_the_kl() -> None:
    """1.5 nats a completion against a target of 1: the error is cut at .2, so x (1 + .2 · 1 / 10); the next one has it.

    Against a target of 6 it is -.2: x (1 - .02).
    """
    algo = algorithm(kl_target=1.0, kl_horizon=10.0)
    state, batch = targets(algo, one_row())
    np.testing.assert_allclose(state.kl_coef, 0.1 * 1.02, rtol=1e-6)
    np.testing.assert_allclose(batch["kl_coef"], [0.1], rtol=1e-6)
    later = targets(algo, one_row(), state)[1]
    np.testing.assert_allclose(completion(later["returns"])[0, -1], 1 - 0.5 * 0.102, rtol=1e-6)
    lower = targets(algorithm(kl_target=6.0, kl_horizon=10.0), one_row())[0]
    np.testing.assert_allclose(lower.kl_coef, 0.1 * 0.98, rtol=1e-6)
    assert float(targets(algorithm(), one_row())[0].kl_coef) == np.float32(0.1)


# -- the loss


def outputs(logprobs: Any, values: Any) -> Outputs:
    entropy = jnp.full(np.asarray(logprobs).shape, 2.0)
    return Outputs(on_completion(logprobs), on_completion(entropy), values=on_completion(values))


def test_the_loss_by_hand() -> None:
    """Ratios 1.5, 1, .5 on advantages .3125, .325, .35: gains 1.2 · .3125 (clipped), .325, .5 · .35.

    Values .5, .4, .6 from .2, .4, .6 towards .5125, .725, .95: the first moved by .3, so it counts from .2 + .2 = .4:
    max(.0125², .1125²) / 2, then .325² / 2 and .35² / 2.
    """
    algo = algorithm()
    batch = targets(algo, one_row())[1]
    out = outputs(-1 + np.log([[1.5, 1.0, 0.5]]), [[0.5, 0.4, 0.6]])
    got = terms_of(algo, out, batch, algo.init())
    policy = -(1.2 * 0.3125 + 0.325 + 0.5 * 0.35) / 3
    value = (0.1125**2 + 0.325**2 + 0.35**2) / 2 / 3
    np.testing.assert_allclose(got["policy"], policy, rtol=1e-5)
    np.testing.assert_allclose(got["value"], value, rtol=1e-5)
    np.testing.assert_allclose(got["total"], policy + 0.1 * value, rtol=1e-5)
    np.testing.assert_allclose(got["value_clip_fraction"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(got["clip_fraction_high"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(got["value_mean"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(got["return_mean"], (0.5125 + 0.725 + 0.95) / 3, rtol=1e-5)
    np.testing.assert_allclose(got["kl_coef"], 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Distances from the returns .5125, .725, .95 are .5125, .325, .35.
        ("squared", (0.5125**2 + 0.325**2 + 0.35**2) / 6),
        ("huber", (0.3 * (0.5125 - 0.15) + 0.3 * (0.325 - 0.15) + 0.3 * (0.35 - 0.15)) / 3),
    ],
)
def test_other_value_losses_by_hand(kind: str, expected: float) -> None:
    algo = algorithm(value_loss=kind, huber_delta=0.3)
    batch = targets(algo, one_row())[1]
    got = terms_of(algo, outputs([[-1.0] * 3], [[0.0, 0.4, 0.6]]), batch, algo.init())
    np.testing.assert_allclose(got["value"], expected, rtol=1e-5)
    assert "value_clip_fraction" not in got


def test_two_hot_values_are_decoded_for_gae_and_fitted_in_symlog() -> None:
    """Three bins at -20, 0, 20: even logits mean value 0, so R = r = 1; log 2 lies log(2)/20 above the middle."""
    algo = algorithm(value_loss="two_hot", value_bins=3, kl_coef=0.0)
    assert algo.critic_outputs == 3
    exp = experience([1.0], [1], values=np.zeros((1, 1, 3)), final_values=np.zeros((1, 3)))
    batch = targets(algo, exp)[1]
    np.testing.assert_allclose(completion(batch["returns"]), [[1.0]], rtol=1e-5)
    share = np.log(2) / 20
    logits = np.array([0.3, 0.1, -0.2])
    logp = logits - np.log(np.exp(logits).sum())
    got = terms_of(algo, outputs([[-1.0]], logits[None, None]), batch, algo.init())
    np.testing.assert_allclose(got["value"], -((1 - share) * logp[1] + share * logp[2]), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Distances from the running mean's values .3, .5, .2 are .2, .1, .4; a clip has no part in it.
        ("clipped", (0.2**2 + 0.1**2 + 0.4**2) / 6),
        ("squared", (0.2**2 + 0.1**2 + 0.4**2) / 6),
        ("huber", (0.2**2 / 2 + 0.1**2 / 2 + 0.3 * (0.4 - 0.15)) / 3),
    ],
)
def test_a_critic_near_its_running_mean_by_hand(kind: str, expected: float) -> None:
    algo = algorithm(value_loss=kind, huber_delta=0.3, value_ema_coef=0.5, value_ema_decay=0.9)
    assert algo.critic_ema == 0.9 and algorithm().critic_ema == 0
    batch = targets(algo, one_row(ema_values=[[0.3, 0.5, 0.2]]))[1]
    out = outputs([[-1.0] * 3], [[0.5, 0.4, 0.6]])
    got = terms_of(algo, out, batch, algo.init())
    plain = terms_of(algorithm(value_loss=kind, huber_delta=0.3), out, targets(algorithm(), one_row())[1], algo.init())
    np.testing.assert_allclose(got["value_ema"], expected, rtol=1e-5)
    np.testing.assert_allclose(got["total"] - plain["total"], 0.1 * 0.5 * expected, rtol=1e-4)
    assert got["value"] == plain["value"] and "value_ema" not in plain


def test_a_two_hot_critic_near_its_running_mean() -> None:
    """The same as the regulariser of the losses, of whole logits: what travels is the mean's value alone."""
    algo = algorithm(value_loss="two_hot", value_bins=3, value_ema_coef=1.0)
    rng = np.random.default_rng(0)
    slow, new = rng.normal(size=(2, 1, 3, 3))
    exp = one_row(values=np.zeros((1, 3, 3)), final_values=np.zeros((1, 3)), ema_values=slow)
    batch = targets(algo, exp)[1]
    assert batch["ema_values"].shape == (1, 5)
    got = terms_of(algo, outputs([[-1.0] * 3], new), batch, algo.init())
    np.testing.assert_allclose(got["value_ema"], ema_critic_regularizer(new, slow, value_bins(3)).mean(), rtol=1e-5)


def test_micro_batches_add_up() -> None:
    rng = np.random.default_rng(0)
    exp = experience(
        rng.normal(size=4).tolist(),
        [3, 1, 2, 3],
        ref_logprobs=rng.normal(-1, 0.1, (4, 3)),
        values=rng.normal(size=(4, 3)),
        final_values=np.zeros(4),
    )
    algo = algorithm(whiten_advantages="minibatch", entropy_coef=0.01)
    batch = targets(algo, exp)[1]
    out = outputs(rng.normal(-1, 0.2, (4, 3)), rng.normal(size=(4, 3)))
    whole = terms_of(algo, out, batch, algo.init())
    for pieces in (2, 4):
        parts = terms_of(algo, out, batch, algo.init(), pieces)
        for name, value in whole.items():
            np.testing.assert_allclose(parts[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


# -- RTO


def guided(guide: Any, **changes: Any) -> tuple[Any, Experience]:
    config = rto.Config(**{**SETTINGS, "guide_coef": 0.05, **changes})
    return rto.make(config, group_size=1, max_new_tokens=4), one_row(guide_logprobs=guide)


def test_the_guide_s_rewards_sum_to_the_log_ratio_of_the_sequence() -> None:
    """guide - reference is 2.5, .5 and -.5: sum 2.5, times β1; at γ = λ = 1 the first return has it, and the score."""
    algo, exp = guided([[1.0, -1.0, -2.0]], kl_coef=0.0, lam=1.0)
    batch = targets(algo, exp)[1]
    np.testing.assert_allclose(completion(batch["returns"])[0, 0], 1 + 0.05 * 2.5, rtol=1e-6)
    assert algo.needs == {"entropy", "values", "guide_logprobs", "ref_logprobs"}


def test_a_clamp_bounds_each_token() -> None:
    """.05 · (2.5, .5, -.5) is .125, .025, -.025; within ±.05 they sum to .05."""
    algo, exp = guided([[1.0, -1.0, -2.0]], kl_coef=0.0, lam=1.0, guide_clamp=0.05)
    np.testing.assert_allclose(completion(targets(algo, exp)[1]["returns"])[0, 0], 1.05, rtol=1e-6)


def test_without_its_guide_it_is_ppo() -> None:
    algo, exp = guided([[1.0, -1.0, -2.0]], guide_coef=0.0)
    assert algo.needs == algorithm().needs
    jax.tree.map(np.testing.assert_array_equal, targets(algo, exp), targets(algorithm(), exp))
    # And with a guide that says what the reference says.
    same, exp = guided([[-1.5] * 3])
    jax.tree.map(np.testing.assert_array_equal, targets(same, exp), targets(algorithm(), exp))


# -- PPO-max


def maximal(**changes: Any) -> Any:
    config = ppo_max.Config(**{**SETTINGS, "kl_coef": 0.0, "lam": 0.0, "normalized_clip": None, **changes})
    return ppo_max.make(config, group_size=1, max_new_tokens=4)


def batch_of(rewards: Any) -> Experience:
    rows = len(rewards)
    return experience(list(rewards), np.ones(rows, int), values=np.zeros((rows, 1)), final_values=np.zeros(rows))


@pytest.mark.parametrize("cuts", [[6], [1, 3], [2, 4, 5], [3, 9]])
def test_running_moments_are_those_of_all_rewards_together(cuts: list[int]) -> None:
    """Chan's merge against NumPy on the concatenation, whatever the split."""
    rewards = np.random.default_rng(1).normal(3, 2, 12)
    algo = maximal()
    state = algo.init()
    for piece in np.split(rewards, cuts):
        state, batch = algo.targets(state, batch_of(piece))
    assert float(state.rewards.count) == 12
    np.testing.assert_allclose(state.rewards.mean, rewards.mean(), rtol=1e-5)
    np.testing.assert_allclose(running_std(state.rewards), rewards.std(ddof=1), rtol=1e-5)
    expected = (piece - rewards.mean()) / rewards.std(ddof=1)
    np.testing.assert_allclose(completion(batch["advantages"])[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_normalised_rewards_are_clipped_and_centring_is_a_choice() -> None:
    """1, 3: mean 2, spread sqrt(2): ∓1/sqrt(2), within ±.5; only divided they are 1/sqrt(2) and 3/sqrt(2)."""
    exp = batch_of([1.0, 3.0])
    got = completion(maximal(normalized_clip=0.5).targets(maximal().init(), exp)[1]["advantages"])
    np.testing.assert_allclose(got[:, 0], [-0.5, 0.5], rtol=1e-5)
    got = completion(maximal(reward_center=False).targets(maximal().init(), exp)[1]["advantages"])
    np.testing.assert_allclose(got[:, 0], [1 / 2**0.5, 3 / 2**0.5], rtol=1e-5)


def test_its_state_goes_through_prepare() -> None:
    algo = maximal()
    state, batch = algo.targets(algo.init(), batch_of([1.0, 3.0]))
    again, _, denominators = algo.prepare(state, batch, None)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert float(denominators["aggregated"]) == 2


# -- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target steers the KL in the reward"),
        ({"scale_by_percentile": True, "whiten_advantages": "rollout"}, "whitening undoes"),
        ({"value_ema_coef": 1.0, "value_ema_decay": 1.0}, "value_ema_decay is 1.0"),
        ({"kl_in": "loss"}, "'k1' has no gradient in the loss"),
        ({"surrogate": "gspo"}, "sequence_mean_token_mean"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm(**changes)


def test_a_paper_s_numbers_have_no_default() -> None:
    for name in SETTINGS:
        with pytest.raises(TypeError, match=name):
            ppo.Config(**{key: value for key, value in SETTINGS.items() if key != name})
    assert asdict(ppo.Config(**SETTINGS))["missing_end"] == "keep"
