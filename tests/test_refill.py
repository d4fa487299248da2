"""The fast rollout against the plain one: the same tokens and log-probs, whatever slots, groups, loops and mesh."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.config import ConfigError, make_config
from rljax.decoding import Sampling
from rljax.models.decoder import Model
from rljax.models.params import init_params
from rljax.models.segments import _by_entry as segments_by_entry
from rljax.models.segments import one_product
from rljax.refill_plan import CPU_SLOTS, RefillPlan, plan_refill
from rljax.sampler import Generate, make_generate
from rljax.session import open_session
from rljax.sharding import DECODE_RULES, Layout
from rljax.types import FINISH_LENGTH, Prompts, Rollout
from tests.models.tiny import layout, tiny_model
from tests.tiny import tiny_config
from tests.truths import make_prompts

WIDTH, BUDGET, PROMPTS = 6, 9, 8
ENDS = (4, 7)
MODEL = tiny_model("llama", vocab_size=9, num_hidden_layers=2, initializer_range=0.1)


def requests(group: int, empty: tuple[int, ...] = ()) -> Prompts:
    """PROMPTS prompts of 1 to WIDTH tokens, ``group`` requests each; the prompts of ``empty`` have none."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 9, rng.integers(1, WIDTH + 1)).tolist() for _ in range(PROMPTS)]
    rows = [[] if i in empty else row for i, row in enumerate(rows)]
    ids = {"prompt_id": np.repeat(np.arange(PROMPTS), group), "sample_id": np.tile(np.arange(group), PROMPTS)}
    return make_prompts([row for row in rows for _ in range(group)], WIDTH, **{k: v.tolist() for k, v in ids.items()})


def program(model: Model, mesh: str, plan: RefillPlan | None, dtype: Any = jnp.float32, **sampling: Any) -> Generate:
    place = layout(mesh)
    settings = {"max_new_tokens": BUDGET, "end_ids": ENDS, **sampling}
    return make_generate(model, place, Layout(place.mesh, DECODE_RULES), Sampling(**settings), dtype=dtype, refill=plan)


def rollout(
    plan: RefillPlan | None,
    prompts: Prompts,
    mesh: str = "1,1,1",
    model: Model = MODEL,
    dtype: Any = jnp.float32,
    **sampling: Any,
) -> Rollout:
    place = layout(mesh)
    params = init_params(model, place, 0, dtype)
    generate = program(model, mesh, plan, dtype, **sampling)
    return jax.device_get(generate(params, prompts, jax.random.key(1), np.int32(0)))


@cache
def plain(group: int, empty: tuple[int, ...] = ()) -> Rollout:
    return rollout(None, requests(group, empty))


def same(mine: Rollout, other: Rollout, atol: float = 1e-5) -> None:
    counts = ("decode_steps", "slot_steps")
    for name in set(Rollout._fields) - {"behavior_logprobs", "support", *counts}:
        np.testing.assert_array_equal(getattr(mine, name), getattr(other, name), err_msg=name)
    np.testing.assert_allclose(mine.behavior_logprobs, other.behavior_logprobs, rtol=0, atol=atol)
    np.testing.assert_allclose(mine.support, other.support, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("group", "slots", "loops"),
    [
        (4, 5, 1),  # a group lies in several turns of the slots, entries are freed one by one
        (4, 16, 2),  # a second loop of 4 slots
        (4, 32, 1),  # a slot for every request
        (1, 3, 1),  # nothing shared, several prompts prefilled at once
    ],
)
def test_refill_gives_what_the_fixed_batch_gives(group: int, slots: int, loops: int) -> None:
    mine = rollout(RefillPlan(group=group, slots=slots, loops=loops), requests(group))
    same(mine, plain(group))
    lengths = mine.loss_mask.sum(axis=1)
    assert {1, BUDGET} <= set(lengths.tolist())  # ends at once, and never
    assert (mine.finish_reason == FINISH_LENGTH).any()


@pytest.mark.parametrize(("group", "slots", "loops"), [(4, 5, 1), (4, 32, 2), (1, 3, 1)])
def test_a_ring_that_begins_with_half_its_columns(
    group: int, slots: int, loops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of nine columns in the first steps, the same rollout; its program has a loop more."""
    monkeypatch.setattr("rljax.refill_plan.SHORTEST_LAP", BUDGET)
    plan, prompts = RefillPlan(group=group, slots=slots, loops=loops), requests(group)
    same(rollout(plan, prompts), plain(group))
    arguments = (init_params(MODEL, layout(), 0), prompts, jax.random.key(1), np.int32(0))
    grows = program(MODEL, "1,1,1", plan).lower(*arguments).as_text()
    monkeypatch.undo()
    whole = program(MODEL, "1,1,1", plan).lower(*arguments).as_text()
    assert grows.count("stablehlo.while") > whole.count("stablehlo.while")


@pytest.mark.parametrize(
    ("mesh", "plan"),
    [
        ("1,4,1", RefillPlan(group=4, slots=3, uniform_steps=True, prefill_chunk=2)),
        pytest.param("1,2,1", RefillPlan(group=4, slots=16, loops=2), marks=pytest.mark.slow),
        pytest.param("1,4,1", RefillPlan(group=1, slots=3, prefill_chunk=3), marks=pytest.mark.slow),
        pytest.param("1,2,1", RefillPlan(group=4, slots=16, uniform_steps=True), marks=pytest.mark.slow),
    ],
)
def test_half_a_ring_over_data_shards_under_a_window(
    mesh: str, plan: RefillPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a fixed batch on one device, in float64: a window of 3 ends inside the first four columns, and shards
    leave them in step or each by itself.
    """
    monkeypatch.setattr("rljax.refill_plan.SHORTEST_LAP", BUDGET)
    with jax.enable_x64(True):
        model = tiny_model("mistral", vocab_size=9, num_hidden_layers=2, sliding_window=3, initializer_range=0.1)
        settings: dict[str, Any] = {"dtype": jnp.float64, "model": model}
        mine = rollout(plan, requests(plan.group, (2,)), mesh, **settings)
        same(mine, rollout(None, requests(plan.group, (2,)), **settings), atol=1e-12)
    assert not plan.uniform_steps or len(set(mine.decode_steps.tolist())) == 1


@pytest.mark.parametrize(("group", "slots", "chunk"), [(4, 5, 2), pytest.param(1, 3, 3, marks=pytest.mark.slow)])
def test_prompts_may_be_prefilled_in_chunks(group: int, slots: int, chunk: int) -> None:
    """The same to 1e-12 in float64, under a window that ends inside a chunk, with prompts of no tokens among them."""
    with jax.enable_x64(True):
        model = tiny_model("mistral", vocab_size=9, num_hidden_layers=2, sliding_window=4, initializer_range=0.1)
        settings: dict[str, Any] = {"dtype": jnp.float64, "model": model}
        prompts = requests(group, (2,))
        whole = rollout(RefillPlan(group=group, slots=slots), prompts, **settings)
        chunked = rollout(RefillPlan(group=group, slots=slots, prefill_chunk=chunk), prompts, **settings)
        same(chunked, whole, atol=1e-12)


def test_a_chunk_holds_up_no_slot_and_bounds_what_a_prompt_takes() -> None:
    """A prompt of 128 tokens in chunks of 16: the first is read at once, the second while the first's answers run."""
    model = tiny_model("llama", vocab_size=9, num_hidden_layers=2, max_position_embeddings=160, initializer_range=0.1)
    prompts = make_prompts([[i % 9] * 128 for i in range(2) for _ in range(4)], 128, sample_id=[0, 1, 2, 3] * 2)
    prompts = prompts._replace(prompt_id=prompts.prompt_id // 4)
    params, taken, found = init_params(model, layout(), 0), [], []
    for chunk in (0, 16):
        plan = RefillPlan(group=4, slots=4, loops=1, prefill_chunk=chunk)
        compiled = program(model, "1,1,1", plan, end_ids=()).lower(params, prompts, jax.random.key(1), np.int32(0))
        compiled = compiled.compile()
        taken.append(compiled.memory_analysis().temp_size_in_bytes)
        found.append(jax.device_get(compiled(params, prompts, jax.random.key(1), np.int32(0))))
    same(found[1], found[0])
    # 8 chunks of the second prompt go between the 9 steps of the first.
    assert set(found[1].decode_steps.tolist()) == set(found[0].decode_steps.tolist()) == {2 * BUDGET}
    scores = model.config.num_heads * 4
    assert taken[0] - taken[1] > scores * 128 * (128 - 16)


def test_prompts_that_are_no_whole_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="6 columns are not whole chunks of 4"):
        rollout(RefillPlan(group=4, slots=4, prefill_chunk=4), requests(4))


def test_prompts_without_tokens_take_no_slot() -> None:
    empty = (0, 3, 7)
    mine = rollout(RefillPlan(group=4, slots=5), requests(4, empty))
    same(mine, plain(4, empty))
    assert not mine.loss_mask.reshape(PROMPTS, -1)[list(empty)].any()


@pytest.mark.parametrize("plan", [None, RefillPlan(group=4, slots=5)])
def test_a_request_may_have_a_budget_of_its_own(plan: RefillPlan | None) -> None:
    """Its completion is that of the whole budget, cut off; one that ended before is as it was."""
    budgets = np.tile(np.arange(1, BUDGET + 3, dtype=np.int32), PROMPTS * 4)[: PROMPTS * 4]
    mine = rollout(plan, requests(4)._replace(max_new_tokens=budgets))
    whole = plain(4)
    mask = whole.loss_mask & (np.arange(WIDTH + BUDGET) < WIDTH + budgets[:, None])
    assert mask.sum() < whole.loss_mask.sum()
    np.testing.assert_array_equal(mine.loss_mask, mask)
    np.testing.assert_array_equal(mine.tokens[mask], whole.tokens[mask])
    cut = (whole.loss_mask & ~mask).any(axis=1)
    np.testing.assert_array_equal(mine.finish_reason, np.where(cut, FINISH_LENGTH, whole.finish_reason))


def test_steps_and_slots_are_counted() -> None:
    """Without end tokens 32 requests of 9 tokens keep 8 slots full for 36 steps."""
    mine = rollout(RefillPlan(group=4, slots=8), requests(4), end_ids=())
    assert set(mine.decode_steps.tolist()) == {36}
    assert mine.slot_steps.sum() == 36 * 8 == mine.loss_mask.sum()


@pytest.mark.parametrize(("mesh", "uniform"), [("1,8,1", False), ("1,2,2", True)])
def test_data_shards_and_tensor_shards_change_nothing(mesh: str, uniform: bool) -> None:
    """With uniform steps every shard takes the steps of the slowest, and otherwise its own."""
    model = MODEL.padded_for(2)
    mine = rollout(RefillPlan(group=4, slots=4, uniform_steps=uniform), requests(4), mesh, model)
    same(mine, plain(4))
    assert (len(set(mine.decode_steps.tolist())) == 1) == uniform


def test_windows_grouped_heads_and_truncation_in_float64() -> None:
    """Mistral's window is shorter than prompt and completion; two kv heads are repeated over a tensor degree of 4."""
    with jax.enable_x64(True):
        model = tiny_model("mistral", vocab_size=9, num_hidden_layers=2, sliding_window=4).padded_for(4)
        assert model.config.num_kv_heads == 2
        settings = {"dtype": jnp.float64, "model": model, "temperature": 0.7, "top_k": 5}
        other = rollout(None, requests(4), **settings)
        assert np.isfinite(other.support[other.loss_mask]).all()
        same(rollout(RefillPlan(group=4, slots=6), requests(4), "1,1,4", **settings), other, atol=1e-12)


@pytest.fixture
def by_entry(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Shared prompts are attended entry by entry, however small they are; the shapes of queries that were."""
    seen: list[Any] = []

    def spied(q: Any, *rest: Any) -> Any:
        seen.append(q.shape)
        return segments_by_entry(q, *rest)

    monkeypatch.setattr("rljax.models.segments.MOST_SCORES", 0)
    monkeypatch.setattr("rljax.models.segments._by_entry", spied)
    return seen


@pytest.mark.parametrize(
    ("slots", "loops", "mesh"),
    [(5, 1, "1,1,1"), (16, 2, "1,1,1"), (32, 1, "1,1,1"), (4, 1, "1,2,2"), (4, 1, "1,8,1")],
)
def test_prompts_attended_entry_by_entry(by_entry: list[Any], slots: int, loops: int, mesh: str) -> None:
    same(rollout(RefillPlan(group=4, slots=slots, loops=loops), requests(4), mesh, MODEL.padded_for(2)), plain(4))
    assert by_entry


def test_entry_by_entry_with_windows_grouped_heads_and_empty_prompts_in_float64(by_entry: list[Any]) -> None:
    with jax.enable_x64(True):
        model = tiny_model("mistral", vocab_size=9, num_hidden_layers=2, sliding_window=4).padded_for(4)
        settings: dict[str, Any] = {"dtype": jnp.float64, "model": model}
        prompts = requests(4, (0, 3))
        other = rollout(None, prompts, **settings)
        for mesh in ("1,1,1", "1,1,4"):
            same(rollout(RefillPlan(group=4, slots=6), prompts, mesh, **settings), other, atol=1e-12)
    assert {shape[1:3] for shape in by_entry} == {(2, 4), (4, 2)}  # kv heads, queries each


def test_the_form_of_a_step_goes_by_its_scores() -> None:
    """64 slots, 17 entries of 64 columns, a query a kv head: one product on CPUs. By entry if larger, and elsewhere."""
    accelerator: Any = SimpleNamespace(on_cpu=False)
    assert one_product(layout(), 64, 1, 17, 64)
    assert not one_product(layout(), 256, 4, 65, 1024)
    assert not one_product(accelerator, 64, 1, 17, 64)


@pytest.mark.parametrize(("slots", "mesh"), [(5, "1,1,1"), (4, "1,2,2")])
def test_the_kernel_over_the_ring(monkeypatch: pytest.MonkeyPatch, slots: int, mesh: str) -> None:
    """Interpreted, three blocks of the ring, each slot at an age of its own: what the fixed batch gives."""
    monkeypatch.setattr("rljax.models.ring_kernel.BLOCKS", (3,))
    plan = RefillPlan(group=4, slots=slots, ring_attention="pallas")
    same(rollout(plan, requests(4), mesh, MODEL.padded_for(2)), plain(4))


def test_the_kernel_over_the_ring_under_a_window_with_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rljax.models.ring_kernel.BLOCKS", (3,))
    model = tiny_model("mistral", vocab_size=9, num_hidden_layers=2, sliding_window=4, initializer_range=0.1)
    plan = RefillPlan(group=4, slots=6, ring_attention="pallas")
    same(rollout(plan, requests(4), model=model), rollout(None, requests(4), model=model))


def test_memory_does_not_depend_on_the_number_of_requests() -> None:
    """Twice the prompts: the rows that come back are larger, what the program needs beside them is not."""
    model = tiny_model("llama", num_hidden_layers=2)
    params = init_params(model, layout(), 0)
    generate = program(model, "1,1,1", RefillPlan(group=4, slots=8))
    once = requests(4)
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), once)
    temporary = [
        generate.lower(params, prompts, jax.random.key(1), np.int32(0)).compile().memory_analysis().temp_size_in_bytes
        for prompts in (once, twice)
    ]
    column = 2 * model.config.num_layers * model.config.num_kv_heads * model.config.head_dim * 4
    requests_more = len(once.tokens)
    assert temporary[1] - temporary[0] < requests_more * column  # less than one column of the cache a request


def test_rows_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="32 requests, which are not whole groups of 3"):
        rollout(RefillPlan(group=3, slots=4), requests(4))


def test_the_plan_of_a_device() -> None:
    place = layout("1,2,1")
    assert plan_refill(place, 64, 4, slots=0) is None
    assert plan_refill(place, 64, 4) == RefillPlan(group=4, slots=min(CPU_SLOTS, 32), loops=2, uniform_steps=False)
    assert plan_refill(place, 64, 4, slots=5, loops=1, prefill_chunk=8, uniform_steps="always") == RefillPlan(
        group=4, slots=5, loops=1, prefill_chunk=8, uniform_steps=True
    )


def test_the_kernel_over_the_ring_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ConfigError, match="which needs a TPU, slots that refill, cache_dtype"):
        open_session(make_config(tiny_config(**{"rollout.ring_attention": "pallas"})))
