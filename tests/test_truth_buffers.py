"""Truth 7: no buffer of size [B, T, V] exists in any compiled training program, in either direction."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos import sft
from rljax.algos.base import Algorithm
from rljax.forward import Forward, make_score
from rljax.models.decoder import hidden_states, logits, row_positions
from rljax.models.params import abstract_params, param_shardings
from rljax.optim import OptimConfig, make_optimizer
from rljax.steps import UpdatePlan, init_state, make_update
from tests.models.tiny import layout, tiny_model
from tests.truths import grpo_algorithm, random_batch, tiny_forward

# Distinct primes, V the largest by far; T = P + C. Everything else a program holds is smaller than B x C x V.
B, T, P, V = 7, 31, 8, 1009
C = T - P
MODEL = tiny_model("llama", vocab_size=V, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
LIMIT = B * C * V  # logits at the completion's columns alone, the least that a naive head makes

SHAPE = re.compile(r"\b(?:pred|bf16|[suf]\d+)\[([\d,]+)\]")


def large_buffers(text: str) -> set[str]:
    """The shapes in a compiled program, fused intermediates included, of at least LIMIT entries in any arrangement."""
    return {shape for shape in SHAPE.findall(text) if math.prod(map(int, shape.split(","))) >= LIMIT}


def abstract_batch(rows: int = B) -> dict[str, Any]:
    batch = random_batch(np.random.default_rng(0), V, [(P, C)] * rows, P, C)
    place = layout().rows
    narrow = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in batch.items()}
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in narrow.items()}


def compiled_update(
    algorithm: Algorithm, head_from: int, micro_batches: int = 1, bin_length: int | None = None, **changes: Any
) -> str:
    place = layout()
    forward: Forward = tiny_forward(MODEL, place, **changes)
    optimizer = make_optimizer({"policy": OptimConfig(learning_rate=1e-3)}, 10)
    shardings = {"policy": param_shardings(MODEL, place)}
    params = {"policy": abstract_params(MODEL, place)}
    state = jax.eval_shape(lambda p: init_state(p, shardings, optimizer, algorithm.init(), place), params)
    where = jax.tree.map(lambda _: place.replicated, state)
    plan = UpdatePlan(2, 1, micro_batches, head_from, bin_length)
    update = make_update(algorithm, {"policy": forward}, optimizer, plan, where)
    return update.lower(state, abstract_batch(micro_batches * B), jax.random.key(0)).compile().as_text()


def compiled_score(**changes: Any) -> str:
    score = make_score(tiny_forward(MODEL, layout(), **changes), P, pieces=1)
    return score.lower(abstract_params(MODEL, layout()), abstract_batch()).compile().as_text()


GRPO = grpo_algorithm(kl_coef=0.1, entropy_coef=0.01, max_new_tokens=C)


@pytest.mark.parametrize(
    "program",
    [
        lambda: compiled_update(GRPO, P),
        lambda: compiled_update(GRPO, P, truncates=True, temperature=0.7, dtype=jnp.bfloat16, remat="block"),
        lambda: compiled_update(GRPO, P, micro_batches=2, bin_length=0),
        lambda: compiled_update(sft.make(sft.Config(), group_size=1, max_new_tokens=1), 1),
        lambda: compiled_score(truncates=True),
    ],
    ids=["grpo", "grpo-truncated-bfloat16-remat", "grpo-packed", "sft", "score"],
)
def test_no_logits_of_a_whole_batch(program: Any) -> None:
    text = program()
    assert f",{V}]" in text or f",{MODEL.config.padded_vocab}]" in text  # the chunks' logits are in there
    assert not large_buffers(text)


def test_a_naive_head_is_found_in_either_direction() -> None:
    """The detector sees [B, T, V] in a program that makes it, whole or flattened, forward or backward."""
    batch, params = abstract_batch(), abstract_params(MODEL, layout())

    def loss(params: Any, batch: Any) -> jax.Array:
        segments, positions = batch["valid"].astype(jnp.int32), row_positions(batch["valid"])
        hidden = hidden_states(MODEL, layout(), params, batch["tokens"], segments, positions)[:, P - 1 : -1]
        logprobs = jax.nn.log_softmax(logits(MODEL, params, hidden))
        return -jnp.mean(jnp.take_along_axis(logprobs, batch["tokens"][:, P:, None], axis=-1))

    for function in (loss, jax.grad(loss)):
        assert large_buffers(jax.jit(function).lower(params, batch).compile().as_text())
    assert large_buffers(f"f32[{B},{C},{V}]{{2,1,0}}") and large_buffers(f"bf16[{B * C},{V}]")
    assert large_buffers(f"f32[{C},{B},1024]") and not large_buffers(f"f32[{B},{T},16] s32[{V},16]")
