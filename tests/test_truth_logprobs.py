"""Truth 2: the sampler's log-probs are the teacher-forced ones, truncation included; the ratio starts at 1."""

from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from rljax.data.batches import DataPosition
from rljax.forward import make_score
from rljax.losses.logprobs import token_logprobs, truncated_logprobs
from rljax.models.params import init_params
from rljax.stage_steps import online_step
from rljax.types import Rollout
from tests.models.tiny import layout, row_logits, tiny_model
from tests.truths import (
    digit_share,
    grpo_algorithm,
    main_stage,
    make_gradient,
    make_prompts,
    make_tiny_generate,
    tiny_forward,
    tiny_session,
)

MODEL = tiny_model("qwen2", num_hidden_layers=2)
WIDTH, BUDGET = 7, 8
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 5, "min_p": 0.1},
    {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(MODEL, layout(), seed=0)


def sample(params: Any, settings: dict[str, Any]) -> Rollout:
    """16 completions of 4 prompts of unequal lengths."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 83, n).tolist() for n in (7, 1, 4, 6) for _ in range(4)]
    generate = make_tiny_generate(MODEL, layout(), max_new_tokens=BUDGET, end_ids=(1, 2), **settings)
    prompts = make_prompts(rows, WIDTH, prompt_id=np.repeat(np.arange(4), 4), sample_id=np.tile(np.arange(4), 4))
    return jax.device_get(generate(params, prompts, jax.random.key(7), np.int32(0)))


def score(params: Any, rollout: Rollout, **changes: Any) -> np.ndarray:
    rows = {"tokens": rollout.tokens, "valid": rollout.valid, "support": rollout.support}
    return np.asarray(make_score(tiny_forward(MODEL, layout(), **changes), WIDTH, pieces=2)(params, rows))


def kept_by_sorting(probabilities: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """The kept set of one distribution, written plainly: top-k, then top-p of what is left, then min-p."""
    order = np.argsort(-probabilities)
    keep = order[: settings.get("top_k") or None]
    share = probabilities[keep] / probabilities[keep].sum()
    keep = keep[np.cumsum(share) - share < settings.get("top_p", 1.0)]
    return keep[probabilities[keep] >= settings.get("min_p", 0.0) * probabilities.max()]


def logprobs_by_sorting(logits: np.ndarray, rollout: Rollout, settings: dict[str, Any]) -> np.ndarray:
    """Log-probs of the rollout's tokens on their renormalised kept sets, float64, from whole rows of logits."""
    expected = np.zeros(rollout.tokens.shape)
    for i, t in np.argwhere(rollout.loss_mask):
        scaled = logits[i, t - 1].astype(np.float64) / settings.get("temperature", 1.0)
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        keep = kept_by_sorting(probabilities, settings)
        assert rollout.tokens[i, t] in keep
        expected[i, t] = np.log(probabilities[rollout.tokens[i, t]] / probabilities[keep].sum())
    return expected


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampled_logprobs_are_teacher_forced_logprobs(params: Any, settings: dict[str, Any]) -> None:
    rollout = sample(params, settings)
    mask = rollout.loss_mask
    truncates = bool(settings.keys() - {"temperature"})
    forced = score(params, rollout, temperature=settings.get("temperature", 1.0), truncates=truncates)
    np.testing.assert_allclose(rollout.behavior_logprobs[mask], forced[mask], rtol=0, atol=1e-5)
    expected = logprobs_by_sorting(
        row_logits(MODEL, layout(), params, rollout.tokens, rollout.valid), rollout, settings
    )
    np.testing.assert_allclose(rollout.behavior_logprobs[mask], expected[mask], rtol=0, atol=1e-5)
    assert not rollout.behavior_logprobs[~mask].any()
    if settings:  # and the plain log-probs are something else
        plain = score(params, rollout)
        assert np.abs(rollout.behavior_logprobs - plain)[mask].mean() > 1e-2
    if truncates:
        assert np.isfinite(rollout.support[mask]).mean() > 0.9
        assert (rollout.behavior_logprobs[mask] <= 1e-6).all()


def test_greedy_reports_the_untempered_model(params: Any) -> None:
    rollout = sample(params, {"temperature": 0.0})
    logits = row_logits(MODEL, layout(), params, rollout.tokens, rollout.valid)
    rows, columns = np.nonzero(rollout.loss_mask)
    np.testing.assert_array_equal(rollout.tokens[rows, columns], logits[rows, columns - 1].argmax(axis=-1))
    expected = token_logprobs(logits[rows, columns - 1], rollout.tokens[rows, columns])
    np.testing.assert_allclose(rollout.behavior_logprobs[rows, columns], expected, rtol=0, atol=1e-5)


def test_the_support_recovers_its_set_from_logits_with_rounding_noise(params: Any) -> None:
    """A trainer's logits differ in the last bits; the renormalised log-probs must not jump."""
    settings = SETTINGS[-1]
    rollout = sample(params, settings)
    rows, columns = np.nonzero(rollout.loss_mask)
    logits = row_logits(MODEL, layout(), params, rollout.tokens, rollout.valid)[rows, columns - 1]
    noisy = logits + np.random.default_rng(0).normal(0, 1e-6, logits.shape).astype(np.float32)
    tokens, support = rollout.tokens[rows, columns], rollout.support[rows, columns]
    np.testing.assert_allclose(
        truncated_logprobs(noisy, tokens, support, 0.7),
        rollout.behavior_logprobs[rows, columns],
        rtol=0,
        atol=2e-5,
    )


def test_samples_follow_the_model(params: Any) -> None:
    """2,048 samples of one prompt against the enumerated distribution of its first token and, given it, the second."""
    count, temperature = 2048, 0.7
    generate = make_tiny_generate(MODEL, layout(), max_new_tokens=2, end_ids=(1,), temperature=temperature, top_k=6)
    prompts = make_prompts([[5, 9, 4]] * count, 3, prompt_id=[0] * count, sample_id=list(range(count)))
    tokens = np.asarray(generate(params, prompts, jax.random.key(0), np.int32(0)).tokens)[:, 3:]

    def expected(prefix: list[int]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.asarray([prefix], np.int32)
        scaled = row_logits(MODEL, layout(), params, ids, np.ones(ids.shape, bool))[0, -1].astype(np.float64) / 0.7
        keep = np.argsort(-scaled)[:6]
        weights = np.exp(scaled[keep] - scaled.max())
        return keep, weights / weights.sum()

    def check(drawn: np.ndarray, prefix: list[int]) -> None:
        keep, share = expected(prefix)
        seen = np.bincount(drawn, minlength=83)
        assert seen.sum() == seen[keep].sum()
        enough = share * len(drawn) > 5
        pooled = [*seen[keep][enough], seen[keep][~enough].sum()], [*share[enough], share[~enough].sum()]
        parts = [(s, e * len(drawn)) for s, e in zip(*pooled, strict=True) if e]
        assert stats.chisquare(*zip(*parts, strict=True)).pvalue > 1e-3

    check(tokens[:, 0], [5, 9, 4])
    first = int(np.bincount(tokens[tokens[:, 0] != 1, 0]).argmax())
    check(tokens[tokens[:, 0] == first, 1], [5, 9, 4, first])


def test_the_ratio_is_1_on_the_first_minibatch_and_not_on_the_second() -> None:
    """The second sees parameters that moved. Tempered and truncated; ``test_truth_compiles`` has the plain case."""
    settings = {"rollout.temperature": 0.7, "rollout.top_p": 0.8, "optim.learning_rate": 0.1, "algo.kl_coef": 0.1}
    session = tiny_session(**settings)
    stage = main_stage(session, digit_share)
    metrics = online_step(stage, stage.start({"policy": session.base_params()}), DataPosition(), 0).metrics
    assert abs(np.expm1(metrics["train/first_max_log_ratio"])) <= 1e-5
    assert metrics["train/max_log_ratio"] > 1e-2  # the largest over both minibatches
    # The reference is the policy, but whole: the sampler is nearer to itself by the mass it kept, at least .8.
    assert 0.01 < metrics["train/kl_per_token"] < -np.log(0.8)


@pytest.fixture(scope="module")
def truncated(params: Any) -> tuple[Rollout, Any]:
    """A truncated rollout, and the gradient at the sampler's temperature on its support with KL to a reference."""
    forward = tiny_forward(MODEL, layout(), temperature=0.7, truncates=True)
    gradient = make_gradient(grpo_algorithm(kl_coef=0.1), forward, WIDTH)
    return sample(params, SETTINGS[-1]), gradient


def test_the_ratio_is_to_the_policy_that_sampled(params: Any, truncated: tuple[Rollout, Any]) -> None:
    """Where parameters moved since the rollout, the first minibatch sees the difference of the two policies."""
    rollout, gradient = truncated
    mask, moved = rollout.loss_mask, jax.tree.map(lambda x: 1.1 * x, params)
    now = score(moved, rollout, temperature=0.7, truncates=True)
    gaps = np.abs(now - rollout.behavior_logprobs)[mask]
    assert gaps.max() > 0.1
    metrics = gradient(moved, update_batch(rollout, now))[1]
    np.testing.assert_allclose(metrics["max_log_ratio"], gaps.max(), rtol=1e-4)
    np.testing.assert_allclose(metrics["logprob_gap"], gaps.mean(), rtol=1e-4)
    assert gradient(params, update_batch(rollout, now))[1]["max_log_ratio"] <= 1e-5


def test_kl_to_the_reference_is_between_whole_distributions(params: Any, truncated: tuple[Rollout, Any]) -> None:
    """Where sampling truncates, the ratio is on the support and the KL is not."""
    rollout, gradient = truncated
    mask = rollout.loss_mask
    reference = score(jax.tree.map(lambda x: 1.1 * x, params), rollout, temperature=0.7)
    whole = score(params, rollout, temperature=0.7)
    metrics = gradient(params, update_batch(rollout, reference))[1]
    d = (whole - reference)[mask].astype(np.float64)
    k3 = np.expm1(-d) + d
    np.testing.assert_allclose(metrics["kl"], k3.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], 0.1 * k3.mean(), rtol=1e-4)
    assert np.abs(whole - rollout.behavior_logprobs)[mask].max() > 0.1


def update_batch(rollout: Rollout, ref_logprobs: np.ndarray) -> dict[str, np.ndarray]:
    rows = {name: value for name, value in rollout._asdict().items() if value.ndim == 2}
    return {**rows, "advantages": np.zeros(rollout.tokens.shape), "ref_logprobs": ref_logprobs}
