"""Truth 7: no buffer of size [B, T, V] exists in any compiled training program, in either direction."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos import distillation, dpo, ppo, reward_model, sft
from rljax.algos.base import Algorithm
from rljax.forward import make_score
from rljax.models.decoder import hidden_states, logits, row_positions
from rljax.models.params import abstract_params, param_shardings
from rljax.optim import OptimConfig, make_optimizer
from rljax.steps import UpdatePlan, init_state, make_update
from rljax.types import Experience, Rollout
from tests.models.tiny import layout, tiny_model
from tests.truths import grpo_algorithm, random_batch, tiny_forward

# Distinct primes, V the largest by far; T = P + C. Everything else a program holds is smaller than B x C x V.
B, T, P, V = 7, 31, 8, 2039
C = T - P
K = 3  # of a teacher's tokens
ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1}  # scores of attention are not what is looked for
MODEL = tiny_model("llama", vocab_size=V, num_hidden_layers=1, hidden_size=16, intermediate_size=16, **ONE_HEAD)
SCALAR = MODEL._replace(scores=1)
LIMIT = B * C * V  # logits at the completion's columns alone, the least that a naive head makes

SHAPE = re.compile(r"\b(?:pred|bf16|[suf]\d+)\[([\d,]+)\]")


def large_buffers(text: str) -> set[str]:
    """The shapes in a compiled program, fused intermediates included, of at least LIMIT entries in any arrangement."""
    return {shape for shape in SHAPE.findall(text) if math.prod(map(int, shape.split(","))) >= LIMIT}


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    dtype = np.float32 if x.dtype == np.float64 else x.dtype
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=layout().rows)


def abstract_batch(rows: int = B) -> dict[str, Any]:
    batch = random_batch(np.random.default_rng(0), V, [(P, C)] * rows, P, C)
    of_rows = {"scores": np.zeros(rows), "answer_valid": np.ones(rows, bool)}  # of an answer each
    return jax.tree.map(abstract, {**batch, **of_rows})


def targets(algorithm: Algorithm) -> dict[str, Any]:
    """The batch that an online algorithm makes of a rollout of B rows."""
    assert algorithm.targets is not None
    b, row = abstract_batch(), abstract(np.zeros(B))
    number, top = abstract(np.zeros(B, np.int32)), abstract(np.zeros((B, T, K)))
    rollout = Rollout(
        *(b[name] for name in ("tokens", "valid", "loss_mask", "behavior_logprobs", "support")), *[number] * 5
    )
    experience = Experience(
        rollout,
        rewards=row,
        correct=abstract(np.zeros(B, bool)),
        ref_logprobs=b["ref_logprobs"],
        values=b["ref_logprobs"],
        final_values=row,
        teacher_tokens=abstract(np.zeros((B, T, K), np.int32)),
        teacher_logprobs=top,
    )
    return jax.eval_shape(algorithm.targets, algorithm.init(), experience)[1]


def compiled_update(
    algorithm: Algorithm,
    head_from: int,
    micro_batches: int = 1,
    bin_length: int | None = None,
    *,
    batch: Any = None,
    text_coef: float = 0.0,
    **changes: Any,
) -> Any:
    place = layout()
    models = {tree: MODEL if tree == "policy" else SCALAR for tree in algorithm.trains}
    forwards = {tree: tiny_forward(model, place, **changes) for tree, model in models.items()}
    optimizer = make_optimizer(dict.fromkeys(models, OptimConfig(learning_rate=1e-3)), 10)
    shardings = {tree: param_shardings(model, place) for tree, model in models.items()}
    params = {tree: abstract_params(model, place) for tree, model in models.items()}
    state = jax.eval_shape(lambda p: init_state(p, shardings, optimizer, algorithm.init(), place), params)
    where = jax.tree.map(lambda _: place.replicated, state)
    plan = UpdatePlan(2, 1, micro_batches, head_from, bin_length, text_coef)
    update = make_update(algorithm, forwards, optimizer, plan, where)
    text = (abstract_batch(2 * B),) if text_coef else ()  # a share for each of the two optimizer steps
    return update.lower(state, batch or abstract_batch(micro_batches * B), jax.random.key(0), *text).compile()


def compiled_score(**changes: Any) -> Any:
    score = make_score(tiny_forward(MODEL, layout(), **changes), P, pieces=1)
    return score.lower(abstract_params(MODEL, layout()), abstract_batch()).compile()


GRPO = grpo_algorithm(kl_coef=0.1, entropy_coef=0.01, max_new_tokens=C)
OFFLINE = {"group_size": 1, "max_new_tokens": 1}
DPO = dpo.make(dpo.Config(beta=0.1, weights="wpo"), **OFFLINE)  # whose weights read whole rows of logits
REWARD_MODEL = reward_model.make(reward_model.Config(loss="bradley_terry"), **OFFLINE)
DISTILLATION = distillation.make(distillation.Config(beta=0.5), group_size=1, max_new_tokens=C)
PPO_SETTINGS: dict[str, Any] = {"kl_coef": 0.1, "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean"}
PPO_SETTINGS |= {"value_coef": 0.1, "value_clip": 0.2, "gamma": 1.0, "lam": 0.95, "whiten_advantages": "rollout"}
PPO = ppo.make(ppo.Config(**PPO_SETTINGS), group_size=1, max_new_tokens=C)


@pytest.mark.parametrize(
    "program",
    [
        lambda: compiled_update(GRPO, P),
        lambda: compiled_update(GRPO, P, truncates=True, temperature=0.7, dtype=jnp.bfloat16, remat="block"),
        lambda: compiled_update(GRPO, P, micro_batches=2, bin_length=0),
        lambda: compiled_update(GRPO, P, text_coef=0.5),
        lambda: compiled_update(PPO, P, batch=targets(PPO)),
        lambda: compiled_update(DISTILLATION, P, batch=targets(DISTILLATION)),
        lambda: compiled_update(sft.make(sft.Config(), **OFFLINE), 1),
        lambda: compiled_update(DPO, 1, batch=abstract_batch(2 * B)),
        lambda: compiled_update(REWARD_MODEL, 1, batch=abstract_batch(2 * B)),
        lambda: compiled_score(truncates=True),
    ],
    ids=[
        "grpo",
        "grpo-truncated-bfloat16-remat",
        "grpo-packed",
        "grpo-with-text",
        "ppo-with-critic",
        "distillation",
        "sft",
        "dpo-pairs",
        "reward-model",
        "score",
    ],
)
def test_no_logits_of_a_whole_batch(program: Any, request: pytest.FixtureRequest) -> None:
    """In no shape, and not in the bytes that the program takes beside its arguments and results."""
    compiled = program()
    text = compiled.as_text()
    chunks = f",{V}]" in text or f",{MODEL.config.padded_vocab}]" in text  # the chunks' logits are in there
    assert chunks or "reward-model" in request.node.name
    assert not large_buffers(text)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * B * T * V


def test_a_naive_head_is_found_in_either_direction() -> None:
    """The detector sees [B, T, V] in a program that makes it, whole or flattened, forward or backward."""
    batch, params = abstract_batch(), abstract_params(MODEL, layout())

    def loss(params: Any, batch: Any) -> jax.Array:
        segments, positions = batch["valid"].astype(jnp.int32), row_positions(batch["valid"])
        hidden = hidden_states(MODEL, layout(), params, batch["tokens"], segments, positions)[:, P - 1 : -1]
        logprobs = jax.nn.log_softmax(logits(MODEL, params, hidden))
        return -jnp.mean(jnp.take_along_axis(logprobs, batch["tokens"][:, P:, None], axis=-1))

    for function in (loss, jax.grad(loss)):
        compiled = jax.jit(function).lower(params, batch).compile()
        assert large_buffers(compiled.as_text())
        assert compiled.memory_analysis().temp_size_in_bytes >= 4 * LIMIT
    assert large_buffers(f"f32[{B},{C},{V}]{{2,1,0}}") and large_buffers(f"bf16[{B * C},{V}]")
    assert large_buffers(f"f32[{C},{B},2048]") and not large_buffers(f"f32[{B},{T},16] s32[{V},16]")
