"""DPO and its variants, AOT, and the losses without a reference, on tables of log-probs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rljax.algos import aot, cpo, dpo, orpo, simpo
from rljax.algos.base import Algorithm, Batch
from rljax.types import Outputs
from tests.algos.tables import mask_of, table, terms_of

# Chosen, rejected; chosen, rejected; and a pair without a rejected side, which does not count.
POLICY: list[list[float]] = [[-1, -1], [-1, -1, -2], [-1], [-0.5, -0.5], [-9], []]
REFERENCE: list[list[float]] = [[-1.5, -1.5], [-1, -1, -1], [-1], [-0.5, -0.5], [-1], []]
# First pair: r_w = -2 + 3 = 1, r_l = -4 + 3 = -1, Δ = 2; per token 1/2 and -4/3 + 1 = -1/3, Δ = 5/6. Second pair: 0.
BATCH: Batch = {"loss_mask": mask_of(POLICY), "ref_logprobs": table(REFERENCE)}
LN2 = math.log(2)
SIZES: dict[str, Any] = {"group_size": 1, "max_new_tokens": 1}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def make_dpo(**options: Any) -> Algorithm:
    return dpo.make(dpo.Config(**{"beta": 0.5, **options}), **SIZES)


BY_HAND: dict[str, tuple[dict[str, Any], float, float]] = {
    "sigmoid": ({}, -log_sigmoid(1), LN2),
    "cdpo": ({"label_smoothing": 0.1}, -0.9 * log_sigmoid(1) - 0.1 * log_sigmoid(-1), LN2),
    "robust": (
        {"loss": "robust", "label_smoothing": 0.1},
        (-0.9 * log_sigmoid(1) + 0.1 * log_sigmoid(-1)) / 0.8,
        LN2,
    ),
    "exo": (
        {"loss": "exo", "label_smoothing": 0.1},
        sigmoid(1) * (log_sigmoid(1) - math.log(0.9)) + sigmoid(-1) * (log_sigmoid(-1) - math.log(0.1)),
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    ),
    "ipo": ({"loss": "ipo"}, (5 / 6 - 1) ** 2, 1.0),
    "ipo_sum": ({"loss": "ipo_sum"}, (2 - 1) ** 2, 1.0),
    "hinge": ({"loss": "hinge"}, 0.0, 1.0),
    "nca": ({"loss": "nca"}, -1.5 * log_sigmoid(0.5) - 0.5 * log_sigmoid(-0.5), 2 * LN2),
    "sppo_hard": ({"loss": "sppo_hard"}, (1 - 1) ** 2 + (-1 + 1) ** 2, 2.0),
    "apo_zero": ({"loss": "apo_zero"}, 1 - sigmoid(0.5) + sigmoid(-0.5), 1.0),
    "apo_down": ({"loss": "apo_down"}, sigmoid(0.5) + 1 - sigmoid(1), 1.0),
    "length-normalised": ({"average": True}, -log_sigmoid(5 / 12), LN2),
    # s(1) - s(-1) is e - 1/e; log σ(1) - log σ(-1) = 1; 2 (e^.5 - e^-.5).
    "forward KL": ({"divergence": "forward_kl"}, -log_sigmoid(0.5 * (math.e - 1 / math.e)), LN2),
    "Jensen-Shannon": ({"divergence": "jensen_shannon"}, -log_sigmoid(0.5), LN2),
    "alpha": ({"divergence": "alpha", "alpha": 0.5}, -log_sigmoid(math.exp(0.5) - math.exp(-0.5)), LN2),
    # Half the weight past 2 tokens: r_l = (-1 - 1 - 1) - (-1 - 1 - .5) = -.5, Δ = 1.5.
    "LD": ({"excess_weight": 0.5}, -log_sigmoid(0.75), LN2),
    # Log-collisions of -1: exp((-1 + 1) + (-4/3 + 1)) and exp((-1 + 1) + (-.5 + 1)).
    "WPO": ({"weights": "wpo"}, math.exp(-1 / 3) * -log_sigmoid(1), math.exp(0.5) * LN2),
    "WPO capped": ({"weights": "wpo_capped"}, math.exp(-1 / 3) * -log_sigmoid(1), LN2),
}


def outputs(logprobs: Any = None) -> Outputs:
    values = jnp.asarray(table(POLICY) if logprobs is None else logprobs, jnp.float32)
    return Outputs(values, collision=jnp.full(values.shape, -1.0))


@pytest.mark.parametrize("name", BY_HAND)
def test_variants_by_hand(name: str) -> None:
    options, first, second = BY_HAND[name]
    terms = terms_of(make_dpo(**options), outputs(), BATCH)
    np.testing.assert_allclose(terms["total"], (first + second) / 2, rtol=2e-6, atol=1e-7)


def test_reported_rewards_by_hand() -> None:
    terms = terms_of(make_dpo(), outputs(), BATCH)
    expected = {
        "margin": 0.5 * (2 + 0) / 2,
        "accuracy": (1 + 0) / 2,
        "reward_chosen": 0.5 * (1 + 0) / 2,
        "reward_rejected": 0.5 * (-1 + 0) / 2,
        "logprob_chosen": (-2 - 1) / 2,
        "logprob_rejected": (-4 - 1) / 2,
    }
    np.testing.assert_allclose([terms[name] for name in expected], list(expected.values()), rtol=1e-6)


def test_the_loss_starts_at_ln_2_where_the_policy_is_the_reference() -> None:
    terms = terms_of(make_dpo(), outputs(table(REFERENCE)), BATCH)
    np.testing.assert_allclose(terms["total"], LN2, rtol=1e-6)
    assert terms["margin"] == 0


@pytest.mark.parametrize("average", [False, True])
def test_dpo_and_dpo_norm_equal_torch(average: bool) -> None:
    """The value and the gradient of every token's log-prob (2411.15124: each sum over its |y|)."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 8, 64)
    mask = np.arange(8) < lengths[:, None]
    policy, reference = -rng.gamma(2.0, 1.0, (2, 64, 8))
    algorithm = make_dpo(beta=5.0 if average else 0.1, average=average)
    with jax.enable_x64(True):
        batch = {"loss_mask": mask, "ref_logprobs": reference}
        value, gradient = jax.value_and_grad(lambda x: terms_of(algorithm, Outputs(x), batch)["total"])(policy)
    tensor = torch.tensor(policy, requires_grad=True)
    ratio = ((tensor - torch.tensor(reference)) * torch.tensor(mask)).sum(1)
    if average:
        ratio = ratio / torch.tensor(lengths)
    beta = 5.0 if average else 0.1
    loss = -torch.nn.functional.logsigmoid(beta * (ratio[0::2] - ratio[1::2])).mean()
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-10)
    assert tensor.grad is not None
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss": "hinge", "label_smoothing": 0.1}, "hinge reads no label_smoothing"),
        ({"loss": "exo"}, "exo is infinite at label_smoothing 0.0"),
        ({"loss": "robust", "label_smoothing": 0.5}, "not a rate of wrong labels"),
        ({"loss": "nca", "divergence": "alpha"}, "divergence alpha replaces the loss"),
        ({"divergence": "alpha", "alpha": 0.0}, "alpha 0 is the reverse KL"),
        ({"loss": "ipo", "excess_weight": 0.5}, "excess_weight weighs sums"),
    ],
)
def test_options_that_the_loss_does_not_read_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_dpo(**options)


# -- without a reference


def test_simpo_by_hand() -> None:
    """Means -1 and -4/3, then -1 and -1/2: 2/3 - .5 and -1 - .5."""
    algorithm = simpo.make(simpo.Config(beta=2.0, gamma=0.5), **SIZES)
    terms = terms_of(algorithm, outputs(), {"loss_mask": BATCH["loss_mask"]})
    np.testing.assert_allclose(terms["total"], (-log_sigmoid(1 / 6) - log_sigmoid(-1.5)) / 2, rtol=1e-6)
    np.testing.assert_allclose(terms["margin"], (2 / 3 - 1) / 2, rtol=1e-6)


@pytest.mark.parametrize(("nll", "cloning"), [("sequence_sum", (2 + 1) / 2), ("token_mean", (1 + 1 + 1) / 3)])
def test_cpo_by_hand(nll: Any, cloning: float) -> None:
    """Sums -2 and -4, then -1 and -1."""
    algorithm = cpo.make(cpo.Config(beta=0.5, nll_coef=0.3, nll=nll), **SIZES)
    terms = terms_of(algorithm, outputs(), {"loss_mask": BATCH["loss_mask"]})
    np.testing.assert_allclose(terms["total"], (-log_sigmoid(1) + LN2) / 2 + 0.3 * cloning, rtol=1e-6)


def test_orpo_by_hand() -> None:
    def log_odds(mean: float) -> float:
        return mean - math.log(1 - math.exp(mean))

    algorithm = orpo.make(orpo.Config(odds_coef=0.1), **SIZES)
    terms = terms_of(algorithm, outputs(), {"loss_mask": BATCH["loss_mask"]})
    gaps = log_odds(-1) - log_odds(-4 / 3), log_odds(-1) - log_odds(-0.5)
    np.testing.assert_allclose(terms["total"], (1 + 1 - 0.1 * sum(map(log_sigmoid, gaps))) / 2, rtol=1e-6)


# -- the whole family


FAMILY = {
    **{name: make_dpo(**BY_HAND[name][0]) for name in ("sigmoid", "ipo", "nca", "alpha", "LD", "WPO")},
    "aot": aot.make(aot.Config(beta=0.5, paired=True), **SIZES),
    "aot unpaired": aot.make(aot.Config(beta=0.5, paired=False), **SIZES),
    "simpo": simpo.make(simpo.Config(beta=2.0, gamma=0.5), **SIZES),
    "cpo": cpo.make(cpo.Config(beta=0.5, nll_coef=1.0), **SIZES),
    "orpo": orpo.make(orpo.Config(odds_coef=0.1), **SIZES),
}


def random_table(pairs: int) -> tuple[jax.Array, Batch]:
    rng = np.random.default_rng(1)
    mask = np.arange(6) < rng.integers(1, 6, 2 * pairs)[:, None]
    policy, reference = -rng.gamma(2.0, 0.5, (2, 2 * pairs, 6))
    arrays = {"ref_logprobs": reference, "current_logprobs": policy}
    return jnp.asarray(policy), {"loss_mask": mask, **{k: np.where(mask, v, np.nan) for k, v in arrays.items()}}


@pytest.mark.parametrize("name", FAMILY)
def test_micro_batches_add_up(name: str) -> None:
    """One, two and four cuts of a step give one loss, also where ranks cross its pairs."""
    logprobs, batch = random_table(8)
    whole, *cut = (terms_of(FAMILY[name], outputs(logprobs), batch, pieces=n) for n in (1, 2, 4))
    for terms in cut:
        np.testing.assert_allclose(list(terms.values()), list(whole.values()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILY)
def test_gradients_raise_the_chosen_above_the_rejected_and_are_finite_where_masked_entries_are_nan(name: str) -> None:
    logprobs, batch = random_table(8)
    logprobs = jnp.where(batch["loss_mask"], logprobs, jnp.nan)
    gradient = jax.grad(lambda x: terms_of(FAMILY[name], outputs(x), batch)["total"])(logprobs)
    assert np.isfinite(gradient).all()
    assert (gradient[~batch["loss_mask"]] == 0).all()
    assert gradient[0::2].sum() < 0 < gradient[1::2].sum()


@pytest.mark.parametrize("name", FAMILY)
def test_it_says_what_it_reads(name: str) -> None:
    algorithm = FAMILY[name]
    assert (algorithm.rows, algorithm.unit, algorithm.targets, algorithm.trains) == ("pairs", 2, None, ("policy",))
    assert ("ref_logprobs" in algorithm.needs) == (name not in ("simpo", "cpo", "orpo"))
    assert ("current_logprobs" in algorithm.needs) == name.startswith("aot")
    assert ("collision" in algorithm.needs) == name.startswith("WPO")


@pytest.mark.parametrize("paired", [True, False])
def test_aot_is_the_loss_of_the_sorted_lists(paired: bool) -> None:
    logprobs, batch = random_table(8)
    total = terms_of(FAMILY["aot" if paired else "aot unpaired"], outputs(logprobs), batch)["total"]
    policy, reference = (
        np.where(batch["loss_mask"], x, 0).sum(1) for x in (np.asarray(logprobs), batch["ref_logprobs"])
    )
    upper, lower = (policy[0::2] - policy[1::2], reference[0::2] - reference[1::2])
    if not paired:
        upper, lower = (policy - reference)[0::2], (policy - reference)[1::2]
    expected = np.mean([-log_sigmoid(0.5 * gap) for gap in np.sort(upper) - np.sort(lower)])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
