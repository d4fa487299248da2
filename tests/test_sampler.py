"""The sampler: end tokens, masks, budgets, empty rows; a request gives the same tokens wherever it stands."""

from typing import Any

import jax
import numpy as np
import pytest

from rljax.models.params import init_params
from rljax.types import FINISH_END, FINISH_LENGTH, Prompts, Rollout
from tests.models.tiny import layout, tiny_model
from tests.truths import make_prompts, make_tiny_generate

# Few tokens and nearly flat logits, so that end tokens come early, late and never.
MODEL = tiny_model("llama", vocab_size=9, num_hidden_layers=1, initializer_range=0.1)
ENDS = (4, 7)
BUDGET, WIDTH, ROWS = 6, 5, 48


def make_rows(count: int = ROWS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 9, rng.integers(1, WIDTH + 1)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(MODEL, layout(), seed=0)


@pytest.fixture(scope="module")
def generate(params: Any) -> Any:
    program = make_tiny_generate(MODEL, layout(), max_new_tokens=BUDGET, end_ids=ENDS)

    def run(prompts: Prompts, seed: int = 0) -> Rollout:
        return jax.device_get(program(params, prompts, jax.random.key(seed), np.int32(3)))

    return run


@pytest.fixture(scope="module")
def rollout(generate: Any) -> Rollout:
    return generate(make_prompts(make_rows(), WIDTH))


def test_every_field_follows_from_prompts_and_completions(rollout: Rollout) -> None:
    """Read row by row: up to and including the first end token of either kind, or the whole budget."""
    firsts = []
    for row, prompt in enumerate(make_rows()):
        completion = rollout.tokens[row, WIDTH:]
        ends = np.flatnonzero(np.isin(completion, ENDS))
        length = int(ends[0]) + 1 if len(ends) else BUDGET
        firsts.append(length if len(ends) else 0)
        np.testing.assert_array_equal(rollout.tokens[row, WIDTH - len(prompt) : WIDTH], prompt)
        mask = np.zeros(WIDTH + BUDGET, bool)
        mask[WIDTH : WIDTH + length] = True
        np.testing.assert_array_equal(rollout.loss_mask[row], mask)
        mask[WIDTH - len(prompt) : WIDTH] = True
        np.testing.assert_array_equal(rollout.valid[row], mask)
        assert rollout.finish_reason[row] == (FINISH_END if len(ends) else FINISH_LENGTH)
    # The sample holds every case: at once, in the middle, on the last token, never; by either end token.
    assert {0, 1, 3, BUDGET} <= set(firsts)
    kinds = rollout.tokens[np.arange(ROWS), WIDTH - 1 + np.asarray(firsts)][np.asarray(firsts) > 0]
    assert set(kinds.tolist()) == set(ENDS)
    np.testing.assert_array_equal(rollout.prompt_id, np.arange(ROWS))
    np.testing.assert_array_equal(rollout.step_version, 3)


def test_what_was_not_sampled_holds_zeros(rollout: Rollout) -> None:
    outside = ~rollout.loss_mask
    assert not rollout.behavior_logprobs[outside].any()
    assert not rollout.tokens[outside & (np.arange(WIDTH + BUDGET) >= WIDTH)].any()
    assert (rollout.behavior_logprobs[rollout.loss_mask] < 0).all()
    assert np.isneginf(rollout.support).all()  # nothing was truncated


@pytest.mark.parametrize("pad_id", [*ENDS, 8])
def test_the_pad_id_may_be_an_end_token(generate: Any, rollout: Rollout, pad_id: int) -> None:
    """Masks come from the sampler: ids under padding are not read."""
    again = generate(make_prompts(make_rows(), WIDTH, pad_id=pad_id))
    _same(again._replace(tokens=np.where(again.valid, again.tokens, 0)), rollout, rollout.valid)


def test_end_tokens_inside_a_prompt_do_not_end_it(generate: Any) -> None:
    rows = [[4, 7, 4], [3, 4], [7], [5, 6, 7, 1]] * 4
    rollout = generate(make_prompts(rows + make_rows(ROWS - 16), WIDTH, pad_id=7))
    np.testing.assert_array_equal(rollout.valid[:16, :WIDTH].sum(axis=1), [3, 2, 1, 4] * 4)
    assert rollout.loss_mask[:16, WIDTH].all() and not rollout.loss_mask[:, :WIDTH].any()
    assert rollout.loss_mask[:16].sum(axis=1).max() > 1


def test_a_row_without_a_prompt_fills_up_the_batch(generate: Any, rollout: Rollout) -> None:
    rows = make_rows()
    rows[1] = rows[7] = []
    filled = generate(make_prompts(rows, WIDTH))
    assert not filled.valid[[1, 7]].any() and not filled.loss_mask[[1, 7]].any()
    others = np.setdiff1d(np.arange(ROWS), [1, 7])
    _same(jax.tree.map(lambda x: x[others], filled), jax.tree.map(lambda x: x[others], rollout))


def test_batch_order_does_not_change_a_sample(generate: Any, rollout: Rollout) -> None:
    order = np.random.default_rng(1).permutation(ROWS)
    shuffled = generate(jax.tree.map(lambda leaf: leaf[order], make_prompts(make_rows(), WIDTH)))
    _same(shuffled, jax.tree.map(lambda leaf: leaf[order], rollout))


def test_batch_size_does_not_change_a_sample(generate: Any, rollout: Rollout) -> None:
    few = generate(jax.tree.map(lambda leaf: leaf[5:12], make_prompts(make_rows(), WIDTH)))
    _same(few, jax.tree.map(lambda leaf: leaf[5:12], rollout))


def test_who_a_sample_is_changes_it(generate: Any, rollout: Rollout) -> None:
    """The same prompts under another sample_id, another prompt_id or another key are other draws."""
    prompts = make_prompts(make_rows(), WIDTH)
    for other in (
        generate(prompts._replace(sample_id=prompts.sample_id + 1)),
        generate(prompts._replace(prompt_id=prompts.prompt_id + 100)),
        generate(prompts, seed=1),
    ):
        assert (other.tokens[:, WIDTH] != rollout.tokens[:, WIDTH]).mean() > 0.5


def test_data_shards_do_not_change_a_sample(params: Any, rollout: Rollout) -> None:
    """Eight shards, each with a loop of its own."""
    place = layout("1,8,1")
    generate = make_tiny_generate(MODEL, place, max_new_tokens=BUDGET, end_ids=ENDS)
    spread = generate(
        init_params(MODEL, place, seed=0), make_prompts(make_rows(), WIDTH), jax.random.key(0), np.int32(3)
    )
    assert all(leaf.sharding.is_equivalent_to(place.rows, leaf.ndim) for leaf in spread)
    _same(jax.device_get(spread), rollout)


def _same(mine: Rollout, other: Rollout, where: Any = ...) -> None:
    """The same tokens, masks and numbers; log-probs to rounding."""
    for name in ("valid", "loss_mask", "finish_reason", "sample_id"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(other, name))
    np.testing.assert_array_equal(mine.tokens[where], other.tokens[where])
    np.testing.assert_allclose(mine.behavior_logprobs, other.behavior_logprobs, rtol=0, atol=1e-5)
