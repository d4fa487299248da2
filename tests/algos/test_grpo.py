"""GRPO on tables of log-probs: targets and loss by hand, a NumPy oracle in float64, clips, masks, statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos.base import Batch, total
from rljax.algos.grpo import Config, make
from rljax.losses.masked import count_tokens
from rljax.types import FINISH_END, FINISH_LENGTH, Experience, Outputs, Rollout

SETTINGS: dict[str, Any] = {
    "kl_coef": 0.1,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "advantage_mean": "group",
    "advantage_std": "group",
    "aggregation": "sequence_mean_token_mean",
}


def algorithm(group_size: int = 2, max_new_tokens: int = 4, **changes: Any) -> Any:
    return make(Config(**{**SETTINGS, **changes}), group_size=group_size, max_new_tokens=max_new_tokens)


def experience(rewards: list[float], lengths: list[int], finished: list[bool] | None = None) -> Experience:
    """Two prompt columns and four of completion; log-probs -1 from the sampler, -1.5 from the reference."""
    rows, columns = len(rewards), np.arange(6)
    mask = (columns >= 2) & (columns < 2 + np.asarray(lengths)[:, None])
    reasons = [FINISH_END if f else FINISH_LENGTH for f in finished or [True] * rows]
    rollout = Rollout(
        tokens=np.ones((rows, 6), np.int32),
        valid=mask | (columns < 2),
        loss_mask=mask,
        behavior_logprobs=np.where(mask, -1.0, 0.0),
        support=np.full((rows, 6), -np.inf),
        finish_reason=np.asarray(reasons),
        prompt_id=np.arange(rows) // 2,
        sample_id=np.arange(rows) % 2,
        group_id=np.arange(rows) // 2,
        step_version=np.zeros(rows, np.int32),
    )
    numbers = np.asarray(rewards, np.float64)
    return Experience(rollout, numbers, numbers > 0, ref_logprobs=np.where(mask, -1.5, np.nan))


def advantages(algo: Any, exp: Experience, state: Any = None) -> np.ndarray:
    """The number that stands at every token of a row."""
    values = np.asarray(algo.targets(algo.init() if state is None else state, exp)[1]["advantages"])
    assert (values == values[:, :1]).all()
    return values[:, 0]


def loss_of(algo: Any, logprobs: Any, batch: Batch) -> jax.Array:
    """As the trainer takes it: prepared, divided by its denominators, summed."""
    _, batch, denominators = algo.prepare((), batch, None)
    denominators = {"tokens": count_tokens(batch["loss_mask"]), **denominators}
    outputs = Outputs(logprobs=logprobs, entropy=jnp.full(logprobs.shape, 2.0))
    return total(algo.loss(outputs, batch), denominators)


# -- advantages


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        # Groups (1, 0) and (1, 3): means .5 and 2; unbiased spreads sqrt(.5) and sqrt(2).
        ("group", "none", [0.5, -0.5, -1.0, 1.0]),
        ("group", "group", [0.5 / 0.5**0.5, -0.5 / 0.5**0.5, -1 / 2**0.5, 1 / 2**0.5]),
        # All four: mean 5/4; squares 1/16 + 25/16 + 1/16 + 49/16 = 19/4, over 3.
        ("batch", "none", [-0.25, -1.25, -0.25, 1.75]),
        ("group", "batch", list(np.array([0.5, -0.5, -1.0, 1.0]) / (19 / 12) ** 0.5)),  # Lite PPO
        ("none", "none", [1.0, 0.0, 1.0, 3.0]),
    ],
)
def test_advantages_by_hand(mean: str, std: str, expected: list[float]) -> None:
    algo = algorithm(advantage_mean=mean, advantage_std=std)
    mine = advantages(algo, experience([1, 0, 1, 3], [1, 2, 3, 4]))
    np.testing.assert_allclose(mine, expected, rtol=1e-5)


def test_equal_rewards_give_exactly_nothing() -> None:
    """.1 three times has a mean that rounding moves; the advantage is 0 to the bit, and so is the loss."""
    algo = algorithm(group_size=3, kl_coef=0.0)
    exp = experience([0.1, 0.1, 0.1], [1, 4, 2])
    assert not advantages(algo, exp).any()
    batch = algo.targets(algo.init(), exp)[1]
    assert loss_of(algo, jnp.full((3, 6), -0.7), batch) == 0.0
    assert not np.asarray(jax.grad(lambda x: loss_of(algo, x, batch))(jnp.full((3, 6), -0.7))).any()


def test_running_statistics_see_a_step_before_they_scale_it() -> None:
    """First step (1, 3): mean 2, spread sqrt(2). With (5, 7): mean 4, squares 9 + 1 + 1 + 9 = 20, over 3."""
    algo = algorithm(advantage_mean="running", advantage_std="running")
    first = experience([1, 3], [2, 2])
    np.testing.assert_allclose(advantages(algo, first), [-1 / 2**0.5, 1 / 2**0.5], rtol=1e-5)
    state = algo.targets(algo.init(), first)[0]
    second = advantages(algo, experience([5, 7], [2, 2]), state)
    np.testing.assert_allclose(second, [1 / (20 / 3) ** 0.5, 3 / (20 / 3) ** 0.5], rtol=1e-5)


def test_rows_without_a_completion_are_not_in_batch_statistics() -> None:
    algo = algorithm(advantage_mean="batch", advantage_std="batch")
    filled = experience([1, 0, 1, 3, 100, 200], [1, 2, 3, 4, 0, 0])
    np.testing.assert_allclose(
        advantages(algo, filled)[:4], advantages(algo, experience([1, 0, 1, 3], [1, 2, 3, 4])), rtol=1e-6
    )
    assert algo.targets(algo.init(), filled)[0].count == 4


def test_masked_truncated_rows_stay_in_the_statistics() -> None:
    exp = experience([1, 0, 1, 3], [2, 4, 4, 3], finished=[True, False, False, True])
    plain, masking = algorithm(), algorithm(mask_truncated=True)
    np.testing.assert_array_equal(advantages(masking, exp), advantages(plain, exp))
    moments, batch = masking.targets(masking.init(), exp)
    assert moments.count == 4
    np.testing.assert_array_equal(np.asarray(batch["loss_mask"]).sum(axis=1), [2, 0, 0, 3])
    np.testing.assert_array_equal(plain.targets(plain.init(), exp)[1]["loss_mask"], exp.rollout.loss_mask)
    np.testing.assert_array_equal(masking.prepare((), batch, None)[2]["aggregated"], 2)  # rows that count


def test_targets_keep_what_the_sampler_stored() -> None:
    exp = experience([1, 0], [2, 3])
    batch = algorithm().targets(algorithm().init(), exp)[1]
    for name in ("tokens", "valid", "behavior_logprobs", "support"):
        np.testing.assert_array_equal(batch[name], getattr(exp.rollout, name))
    np.testing.assert_array_equal(batch["ref_logprobs"], exp.ref_logprobs)


# -- the loss


def by_hand() -> tuple[Batch, jax.Array]:
    """Two rows of two tokens and one. Advantages 1 and -1; ratios 1.5 and 1 in the first, .5 in the second."""
    algo = algorithm(advantage_std="none")
    batch = dict(algo.targets(algo.init(), experience([2, 0], [2, 1]))[1])
    logprobs = np.full((2, 6), 9.0)  # where nothing is trained it does not matter
    logprobs[0, 2:4] = -1 + np.log([1.5, 1.0])
    logprobs[1, 2] = -1 + np.log(0.5)
    return batch, jnp.asarray(logprobs)


@pytest.mark.parametrize(
    ("aggregation", "policy"),
    [
        # A = 1: max(-1.5, -1.28) = -1.28 (clipped) and -1. A = -1: max(.5, .8) = .8 (clipped).
        ("token_mean", (-1.28 - 1 + 0.8) / 3),
        ("sequence_mean_token_mean", ((-1.28 - 1) / 2 + 0.8) / 2),
        ("sequence_mean_token_sum", (-1.28 - 1 + 0.8) / 2),
        ("constant_length", (-1.28 - 1 + 0.8) / (2 * 4)),
    ],
)
def test_the_policy_loss_by_hand(aggregation: str, policy: float) -> None:
    batch, logprobs = by_hand()
    algo = algorithm(aggregation=aggregation, kl_coef=0.0)
    np.testing.assert_allclose(loss_of(algo, logprobs, batch), policy, rtol=1e-5)


def test_kl_and_entropy_by_hand() -> None:
    """d = log p - log ref is log 1.5 + .5, .5 and log .5 + .5; k3 = exp(-d) - 1 + d; the entropy is 2 everywhere."""
    batch, logprobs = by_hand()
    d = np.array([np.log(1.5) + 0.5, 0.5, np.log(0.5) + 0.5])
    k3 = np.exp(-d) - 1 + d
    expected = ((-1.28 - 1) / 2 + 0.8) / 2 + 0.1 * (k3[:2].mean() + k3[2]) / 2 - 0.01 * 2
    np.testing.assert_allclose(loss_of(algorithm(entropy_coef=0.01), logprobs, batch), expected, rtol=1e-5)


def test_clip_fractions_by_hand() -> None:
    """Of three tokens one passes the upper edge with A > 0 and one the lower edge with A < 0."""
    batch, logprobs = by_hand()
    terms = algorithm().loss(Outputs(logprobs, jnp.full(logprobs.shape, 2.0)), batch)
    numbers = {name: (float(term.numerator), term.denominator, term.coef) for name, term in terms.items()}
    assert numbers["clip_fraction_high"] == (1, "tokens", 0)
    assert numbers["clip_fraction_low"] == (1, "tokens", 0)
    assert numbers["entropy"] == (6, "tokens", 0)


@pytest.mark.parametrize(
    ("advantage", "ratio", "clipped"),
    [
        (1.0, 1.281, True),
        (1.0, 1.279, False),
        (1.0, 0.5, False),  # the other edge does not bind
        (-1.0, 0.799, True),
        (-1.0, 0.801, False),
        (-1.0, 2.0, False),
    ],
)
def test_the_gradient_ends_just_past_the_edge_that_binds(advantage: float, ratio: float, clipped: bool) -> None:
    algo = algorithm(kl_coef=0.0, aggregation="token_mean")
    batch = dict(algo.targets(algo.init(), experience([1, 0], [1, 0]))[1])
    batch["advantages"] = jnp.full((2, 6), advantage)
    logprobs = jnp.full((2, 6), -1 + np.log(ratio))
    gradient = np.asarray(jax.grad(lambda x: loss_of(algo, x, batch))(logprobs))
    assert not np.delete(gradient.ravel(), 2).any()  # one token is trained
    np.testing.assert_allclose(gradient[0, 2], 0 if clipped else -advantage * ratio, rtol=1e-5)


def test_dual_clip_bounds_what_a_large_ratio_costs() -> None:
    """A = -1 and ratio 5: plain 5, bounded at 3, where the gradient ends too. A > 0 is not touched."""
    batch, _ = by_hand()
    logprobs = jnp.full((2, 6), -1 + np.log(5.0))
    settings = {"kl_coef": 0.0, "aggregation": "sequence_mean_token_mean"}
    plain, bounded = algorithm(**settings), algorithm(dual_clip=3.0, **settings)
    np.testing.assert_allclose(loss_of(plain, logprobs, batch), (-1.28 + 5) / 2, rtol=1e-5)
    np.testing.assert_allclose(loss_of(bounded, logprobs, batch), (-1.28 + 3) / 2, rtol=1e-5)
    assert not np.asarray(jax.grad(lambda x: loss_of(bounded, x, batch))(logprobs)).any()
    assert np.asarray(jax.grad(lambda x: loss_of(plain, x, batch))(logprobs))[1, 2] > 1


# -- an oracle


def oracle(logprobs: np.ndarray, entropy: np.ndarray, exp: Experience, group_size: int) -> float:
    """GRPO as its paper writes it, one row and one token at a time, float64; the third answer is 2402.03300, eq. 3."""
    losses = []
    for g in range(0, len(exp.rewards), group_size):
        group = exp.rewards[g : g + group_size]
        for i in range(g, g + group_size):
            advantage = (exp.rewards[i] - group.mean()) / (group.std(ddof=1) + 1e-6)
            tokens = np.flatnonzero(exp.rollout.loss_mask[i])
            row = []
            for t in tokens:
                ratio = np.exp(logprobs[i, t] - exp.rollout.behavior_logprobs[i, t])
                gain = min(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage)
                d = exp.ref_logprobs[i, t] - logprobs[i, t]
                row.append(-gain + 0.1 * (np.exp(d) - d - 1) - 0.01 * entropy[i, t])
            losses.append(np.mean(row))
    return float(np.mean(losses))


def test_targets_and_loss_match_the_oracle() -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        exp = experience(rng.normal(size=12).tolist(), rng.integers(1, 5, 12).tolist())
        mask = exp.rollout.loss_mask
        old, ref, logprobs = (np.where(mask, rng.normal(-2, 0.3, mask.shape), np.nan) for _ in range(3))
        exp = exp._replace(rollout=exp.rollout._replace(behavior_logprobs=old), ref_logprobs=ref)
        entropy = rng.random(mask.shape)
        algo = algorithm(group_size=4, entropy_coef=0.01)
        _, batch, denominators = algo.prepare((), algo.targets(algo.init(), exp)[1], None)
        terms = algo.loss(Outputs(jnp.asarray(logprobs), jnp.asarray(entropy)), batch)
        mine = total(terms, {"tokens": count_tokens(mask), **denominators})
        np.testing.assert_allclose(mine, oracle(logprobs, entropy, exp, 4), rtol=1e-12)


# -- needs and settings


def test_a_reference_is_needed_only_for_its_coefficient() -> None:
    assert algorithm().needs == {"entropy", "ref_logprobs"}
    free = algorithm(kl_coef=0.0)
    assert free.needs == {"entropy"}
    batch = free.targets(free.init(), experience([1, 0], [1, 1])._replace(ref_logprobs=None))[1]
    assert "ref_logprobs" not in batch


def test_settings_that_do_not_exist() -> None:
    with pytest.raises(KeyError, match="median"):
        algorithm(aggregation="median")
    algo = algorithm(advantage_std="rows")
    with pytest.raises(ValueError, match="std='rows'; choose one of group, batch, running, none"):
        algo.targets(algo.init(), experience([1, 0], [1, 1]))
