"""Truths 1 and 3: masked is removed, padding changes nothing, packed is unpacked; the end token is trained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos.base import Batch
from rljax.forward import make_score
from rljax.models.params import init_params
from rljax.types import Experience
from tests.models.tiny import layout, tiny_model
from tests.truths import (
    grpo_algorithm,
    make_gradient,
    make_prompts,
    make_tiny_generate,
    random_batch,
    relative_error,
    tiny_forward,
)

MODEL = tiny_model("qwen2", vocab_size=61, num_hidden_layers=2)
P, C = 5, 6
LENGTHS = [(5, 6), (1, 2), (3, 6), (4, 1), (2, 3), (5, 4)]  # prompt, completion
ALGORITHM = grpo_algorithm(kl_coef=0.1, entropy_coef=0.01, aggregation="sequence_mean_token_mean")
FLOATS = ("behavior_logprobs", "ref_logprobs", "advantages")


@pytest.fixture(scope="module", autouse=True)
def float64() -> Any:
    """What changes nothing is seen best where rounding does not hide it."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(MODEL, layout(), seed=0, dtype=jnp.float64)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return random_batch(np.random.default_rng(0), 61, LENGTHS, P, C)


@pytest.fixture(scope="module")
def gradient(params: Any) -> Any:
    program = make_gradient(ALGORITHM, tiny_forward(MODEL, layout(), dtype=jnp.float64), P)
    return lambda batch: program(params, batch)


@pytest.fixture(scope="module")
def plain(gradient: Any, batch: Batch) -> Any:
    return gradient(batch)


def test_what_stands_under_the_masks_changes_nothing(gradient: Any, batch: Batch, plain: Any) -> None:
    """Other ids under padding, NaN and infinity at every entry that is not trained: the same bits."""
    spoilt = dict(batch)
    others = np.random.default_rng(1).integers(0, 61, batch["tokens"].shape, dtype=np.int32)
    spoilt["tokens"] = np.where(batch["valid"], batch["tokens"], others)
    for name, value in zip(FLOATS, (np.nan, np.inf, -np.inf), strict=True):
        spoilt[name] = np.where(batch["loss_mask"], batch[name], value)
    mine = gradient(spoilt)
    jax.tree.map(np.testing.assert_array_equal, mine, plain)
    assert np.isfinite(mine[1]["loss"]) and not mine[1]["skipped"]


def test_masked_rows_are_removed_rows(gradient: Any, batch: Batch, plain: Any) -> None:
    """Rows without a trained token, after the six that stay; the denominators do not count them."""
    more = {name: np.concatenate([x, x[[0, 2]]]) for name, x in batch.items()}
    more["loss_mask"] = np.concatenate([batch["loss_mask"], np.zeros((2, P + C), bool)])
    mine = gradient(more)
    assert relative_error(mine[0], plain[0]) < 1e-12
    np.testing.assert_allclose(mine[1]["loss"], plain[1]["loss"], rtol=1e-12)
    trained = gradient({**more, "loss_mask": np.concatenate([batch["loss_mask"], batch["loss_mask"][[0, 2]]])})
    assert relative_error(trained[0], plain[0]) > 1e-2  # while the same rows unmasked do count


def test_masked_tokens_are_removed_tokens(gradient: Any, batch: Batch) -> None:
    """Completions masked from their third token on are completions that stop there."""
    early = P + 2
    masked = {**batch, "loss_mask": batch["loss_mask"] & (np.arange(P + C) < early)}
    cut = {**masked, "valid": batch["valid"] & (np.arange(P + C) < early)}
    mine, other = gradient(masked), gradient(cut)
    assert relative_error(mine[0], other[0]) < 1e-12
    np.testing.assert_allclose(mine[1]["policy"], other[1]["policy"], rtol=1e-12)


def test_left_padding_changes_no_gradient(params: Any, batch: Batch, plain: Any) -> None:
    extra = 7
    program = make_gradient(ALGORITHM, tiny_forward(MODEL, layout(), dtype=jnp.float64), P + extra)
    wider = {name: np.pad(x, ((0, 0), (extra, 0))) for name, x in batch.items()}
    wider["tokens"][:, :extra] = 60
    mine = program(params, wider)
    assert relative_error(mine[0], plain[0]) < 1e-12
    for name in ("loss", "policy", "kl", "entropy", "max_log_ratio"):
        np.testing.assert_allclose(mine[1][name], plain[1][name], rtol=1e-12, err_msg=name)


def test_left_padding_changes_no_sample(params: Any) -> None:
    rows = [np.random.default_rng(i).integers(0, 61, 1 + i % 5).tolist() for i in range(12)]
    generate = make_tiny_generate(MODEL, layout(), jnp.float64, max_new_tokens=C, end_ids=(2, 3, 4, 5, 6))
    narrow, wide = (
        jax.device_get(generate(params, make_prompts(rows, width, pad_id=width), jax.random.key(0), np.int32(0)))
        for width in (5, 11)
    )
    assert 0 < narrow.finish_reason.mean() < 1
    np.testing.assert_array_equal(wide.tokens[:, 11:], narrow.tokens[:, 5:])
    np.testing.assert_array_equal(wide.loss_mask[:, 11:], narrow.loss_mask[:, 5:])
    np.testing.assert_allclose(wide.behavior_logprobs[:, 11:], narrow.behavior_logprobs[:, 5:], rtol=0, atol=1e-12)


def test_packed_is_unpacked(params: Any) -> None:
    """Three sequences in one row, told apart by segments and positions, against a row for each."""
    rng = np.random.default_rng(2)
    parts = [rng.integers(0, 61, n).astype(np.int32) for n in (5, 8, 3)]
    width = 19
    alone = {"tokens": np.zeros((3, width), np.int32), "valid": np.zeros((3, width), bool)}
    for i, part in enumerate(parts):
        alone["tokens"][i, : len(part)], alone["valid"][i, : len(part)] = part, True
    packed = {name: np.full((1, width), 0, np.int32) for name in ("tokens", "segments", "positions")}
    for name, values in (
        ("tokens", parts),
        ("segments", [np.full(len(part), i + 1) for i, part in enumerate(parts)]),
        ("positions", [np.arange(len(part)) for part in parts]),
    ):
        packed[name][0, :16] = np.concatenate(values)
    packed["valid"] = packed["segments"] > 0

    forward = tiny_forward(MODEL, layout(), dtype=jnp.float64)
    run = jax.jit(lambda rows: forward.outputs(params, rows, 1, frozenset({"entropy"})))
    one, each = run(packed), run(alone)
    start = 0
    for i, part in enumerate(parts):
        inside = slice(start + 1, start + len(part))  # its first token has nothing before it
        np.testing.assert_allclose(one.logprobs[0, inside], each.logprobs[i, 1 : len(part)], rtol=0, atol=1e-12)
        np.testing.assert_allclose(one.entropy[0, inside], each.entropy[i, 1 : len(part)], rtol=0, atol=1e-12)
        start += len(part)
    # Without segments the parts see each other.
    mixed = run({name: packed[name] for name in ("tokens", "valid")})
    assert np.abs(mixed.logprobs[0, 6:13] - one.logprobs[0, 6:13]).max() > 1e-2


def test_the_end_token_is_sampled_kept_scored_and_trained(params: Any, gradient: Any) -> None:
    """Where it is the only token of a completion, and any token is one, the padding's included."""
    generate = make_tiny_generate(MODEL, layout(), jnp.float64, max_new_tokens=C, end_ids=tuple(range(61)))
    prompts = make_prompts([[4, 9, 1]] * 6, P, pad_id=4, prompt_id=[0] * 6, sample_id=list(range(6)))
    rollout = jax.device_get(generate(params, prompts, jax.random.key(1), np.int32(0)))
    assert rollout.loss_mask[:, P].all() and rollout.loss_mask.sum() == 6
    ends = rollout.tokens[:, P].tolist()
    assert ends.count(ends[0]) == 1  # what the first sampled no other did
    algorithm = grpo_algorithm(kl_coef=0.1, group_size=6, max_new_tokens=C)
    experience = Experience(rollout, np.eye(6)[0], np.eye(6)[0] == 1, ref_logprobs=rollout.behavior_logprobs)
    batch = jax.device_get(algorithm.targets(algorithm.init(), experience)[1])
    np.testing.assert_array_equal(batch["loss_mask"], rollout.loss_mask)
    descent, metrics = gradient(batch)
    assert metrics["max_log_ratio"] < 1e-12  # the trainer scores it as the sampler did
    score = make_score(tiny_forward(MODEL, layout(), dtype=jnp.float64), P, pieces=1)
    moved = jax.tree.map(lambda x, g: x - 1e-2 * g, params, descent)
    change = np.asarray(score(moved, batch) - score(params, batch))[:, P]
    assert change[0] > 1e-4 and change[1:].mean() < -1e-4
