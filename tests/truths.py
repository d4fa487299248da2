"""What the tests of the truths share: the tiny run on some of the simulated devices, random rows, gradients."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rljax.algos import grpo
from rljax.algos.base import Algorithm, Batch
from rljax.config import make_config
from rljax.decoding import Sampling
from rljax.forward import Forward
from rljax.models.decoder import Model, Params
from rljax.models.params import param_shardings
from rljax.rewards.base import Score
from rljax.rewards.runner import RewardRunner
from rljax.sampler import Generate, make_generate
from rljax.session import Session, open_session
from rljax.setup import make_source
from rljax.sharding import DECODE_RULES, Layout, to_global
from rljax.stages import Stage, build_stage
from rljax.steps import UpdatePlan, init_state, make_update
from rljax.types import Prompts
from tests.tiny import tiny_config


def tiny_session(mesh: str = "1,1,1", **overrides: Any) -> Session:
    """The tiny run, without its warm start, on as many devices as ``mesh`` multiplies to."""
    config = make_config(tiny_config(mesh=mesh, recipe=("main",), **overrides))
    return open_session(config, jax.devices()[: math.prod(map(int, mesh.split(",")))])


def digit_share(prompt: str, completion: str) -> Score:
    """A reward that random weights get a part of at once: the share of digits, right from a half on."""
    share = sum(c.isdigit() for c in completion) / max(len(completion), 1)
    return Score(share, correct=share >= 0.5)


def main_stage(session: Session, reward: Callable[..., Any]) -> Stage:
    """Its GRPO stage with another reward, the reference frozen where it needs one."""
    config = session.config
    runner = RewardRunner([("reward", reward, 1.0)], workers=1)
    stage = build_stage(session, config, 0, make_source(session, config), runner)
    if "ref_logprobs" in stage.algorithm.needs:
        stage.freeze("reference", session.base_params())
    return stage


def make_tiny_generate(model: Model, layout: Layout, dtype: Any = jnp.float32, **sampling: Any) -> Generate:
    """A sampler that decodes on the training mesh."""
    decode = Layout(layout.mesh, DECODE_RULES)
    return make_generate(model, layout, decode, Sampling(**sampling), dtype=dtype)


def make_prompts(rows: list[list[int]], width: int, pad_id: int = 0, **ids: list[int]) -> Prompts:
    """Left-padded; ``prompt_id`` counts rows and ``sample_id`` is 0 unless they are given."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], valid[i, width - len(row) :] = row, True
    prompt_id = np.asarray(ids.get("prompt_id", range(len(rows))), np.int32)
    sample_id = np.asarray(ids.get("sample_id", [0] * len(rows)), np.int32)
    return Prompts(tokens, valid, prompt_id, sample_id)


def grpo_algorithm(*, group_size: int = 2, max_new_tokens: int = 8, **changes: Any) -> Algorithm:
    settings = {
        "kl_coef": 0.0,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "advantage_mean": "group",
        "advantage_std": "group",
        "aggregation": "token_mean",
    }
    return grpo.make(grpo.Config(**{**settings, **changes}), group_size=group_size, max_new_tokens=max_new_tokens)


def tiny_forward(model: Model, layout: Layout, **changes: Any) -> Forward:
    settings = {"dtype": jnp.float32, "remat": "none", "logits_chunk": 16, "temperature": 1.0, "truncates": False}
    settings |= {"attention": "xla"}
    return Forward(model=model, layout=layout, **{**settings, **changes})


def random_batch(
    rng: np.random.Generator, vocab: int, lengths: list[tuple[int, int]], head_from: int, budget: int
) -> Batch:
    """A GRPO batch of random tokens; each row has (prompt, completion) tokens, the column between them is one."""
    columns = np.arange(head_from + budget)
    prompt, completion = np.asarray(lengths).T[..., None]
    valid = (columns >= head_from - prompt) & (columns < head_from + completion)
    mask = valid & (columns >= head_from)
    numbers = partial(rng.normal, size=mask.shape)
    return {
        "tokens": rng.integers(0, vocab, mask.shape, dtype=np.int32),
        "valid": valid,
        "loss_mask": mask,
        "support": np.full(mask.shape, -np.inf),
        "behavior_logprobs": numbers(-3.0, 0.3),
        "ref_logprobs": numbers(-3.0, 0.3),
        "advantages": numbers(),
    }


# Instead of a moment it keeps the gradient itself, and moves nothing.
KEEP_GRADIENT = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, gradients), gradients),
)


def make_gradient(
    algorithm: Algorithm, forward: Forward, head_from: int, micro_batches: int = 1, bin_length: int | None = None
) -> Callable[[Params, Batch], tuple[Params, dict[str, np.ndarray]]]:
    """``gradient(params, batch) -> (gradient of the policy, metrics)``, as NumPy, through the real update program."""
    shardings = {"policy": param_shardings(forward.model, forward.layout)}
    plan = UpdatePlan(1, 1, micro_batches, head_from, bin_length)
    programs: dict[str, Any] = {}

    def gradient(params: Params, batch: Batch) -> tuple[Params, dict[str, np.ndarray]]:
        params = jax.tree.map(jnp.copy, params)  # the update donates them
        state = init_state({"policy": params}, shardings, KEEP_GRADIENT, (), forward.layout)
        if not programs:
            where = jax.tree.map(lambda x: x.sharding, state)
            programs["update"] = make_update(algorithm, {"policy": forward}, KEEP_GRADIENT, plan, where)
        dtype = jnp.promote_types(forward.dtype, jnp.float32)
        placed = {name: to_global(_wide(x, dtype), forward.layout.rows) for name, x in batch.items()}
        state, metrics = programs["update"](state, placed, jax.random.key(0))
        return jax.tree.map(np.asarray, state.opt_state["policy"]), {k: np.asarray(v)[0] for k, v in metrics.items()}

    return gradient


def _wide(x: np.ndarray, dtype: Any) -> np.ndarray:
    return x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x


def relative_error(tree: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what was expected, all leaves together."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    squares = np.sum([[np.sum((np.asarray(a) - b) ** 2), np.sum(np.square(b))] for a, b in pairs], axis=0)
    return float(np.sqrt(squares[0] / squares[1]))
