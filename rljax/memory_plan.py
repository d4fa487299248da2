"""Bytes a device by owner, estimated from shapes, shardings and what autodiff keeps; nothing is compiled."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rljax.config import RolloutConfig
from rljax.forward import tree_outputs, vocab_block
from rljax.losses.chunked_logprobs import count_blocks
from rljax.models.attention import QUERY_CHUNK
from rljax.models.kernels import choose
from rljax.models.layers import wide_dtype
from rljax.models.params import abstract_params, quantized, quantized_shardings
from rljax.models.quantized import cast
from rljax.models.segments import one_product
from rljax.refill_plan import starts_with_half
from rljax.session import Session
from rljax.sharding import Layout
from rljax.stage_models import frozen_sources
from rljax.stage_state import abstract_saved
from rljax.stages import Stage

# Who holds memory in which phase of a step.
PHASES = {
    "reference": ("always", "reference"),
    "prefill": ("always", "rollout", "prefill"),
    "decode": ("always", "rollout", "decode"),
    "update": ("always", "update"),
}
# Rows of the trace: a number that no dimension of a model has.
TRACED_ROWS = 1009


class Owner(NamedTuple):
    """Who holds memory on one device, and when."""

    name: str
    bytes: int
    when: str  # one of the words in PHASES


def bytes_by_owner(stage: Stage) -> list[Owner]:
    """An estimate from shapes, shardings and what autodiff keeps, traced and not compiled.

    The TPU compiler took 0.99 to 1.13 times as much for Qwen3-8B on v5e:4x4 and Qwen2.5-0.5B on one chip (ahead of
    time, libtpu 0.0.42), XLA on CPUs 0.8 to 1.2 times for what tests/test_plan.py compiles.
    """
    session = stage.session
    state = abstract_saved(stage)["train"]
    moments = "update" if stage.config.offload_optimizer else "always"
    owners = [
        Owner("parameters", _local_bytes(state.params), "always"),
        Owner("optimizer state", _local_bytes(state.opt_state), moments),
    ]
    if stage.algorithm.critic_ema:
        owners.append(Owner("running mean of the critic", _local_bytes(state.params["critic"]), "always"))
    for name in frozen_sources(stage.config, stage.algorithm):
        model = session.abstract_tree(stage.forwards[name].model, stage.frozen_dtype(name))
        once = name == "reference" and (stage.caches_reference or stage.config.offload_reference)
        owners.append(Owner(f"frozen {name.replace('_', ' ')}", _local_bytes(model), "reference" if once else "always"))
    rollouts = [_rollout_owners(stage, *decoded) for decoded in _decoded(stage)]
    largest = max(rollouts, key=lambda found: sum(owner.bytes for owner in found), default=[])
    return owners + largest + _update_owners(stage)


def _decoded(stage: Stage) -> list[tuple[int, int, RolloutConfig]]:
    """Rows and samples a prompt of rollout and evaluation, and how they are written."""
    config = stage.session.config
    evaluates = config.reward.names and (config.data.dev or config.data.dev_rows or config.data.test)
    r = stage.config.rollout
    found = [(stage.config.rollout_rows // r.pieces, r.group_size, r)] if stage.online else []
    exact = replace(r, weights_dtype="compute", cache_dtype="compute")
    evaluated = (config.eval.prompts_per_batch * config.eval.completions, config.eval.completions, exact)
    return found + ([evaluated] if evaluates else [])


def _decode_weights(session: Session, dtype: str) -> Any:
    """The copy of the policy that samples."""
    model, layout = session.model, session.decode
    plain = abstract_params(model, layout, session.dtype)
    if dtype != "int8":
        return plain
    rounded = jax.eval_shape(lambda params: cast(quantized(model, params), session.dtype), plain)
    places = quantized_shardings(model, layout)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), rounded, places)


def _rollout_owners(stage: Stage, all_rows: int, group: int, r: RolloutConfig) -> list[Owner]:
    session, layout = stage.session, stage.session.decode
    c, item = session.model.config, jnp.dtype(session.dtype).itemsize
    rows = -(-all_rows // layout.data_shards)
    copy = _decode_weights(session, r.weights_dtype)
    is_copied = layout.on_cpu or jax.tree.leaves(copy) != jax.tree.leaves(session.abstract_policy())
    refill = session.refill(stage.config, all_rows, group)
    wide = jnp.dtype(wide_dtype(session.dtype)).itemsize
    # An int8 row has a scale; slots that refill have a float32 cache on CPUs.
    row = c.head_dim + 4 if r.cache_dtype == "int8" else c.head_dim * (wide if refill and layout.on_cpu else item)
    column = 2 * c.num_layers * max(c.num_kv_heads, layout.tensor) // layout.tensor * row
    slots, prompts, prefilled = rows, rows, rows
    if refill is not None:
        groups = -(-rows // group)
        slots, prompts, prefilled = refill.slots, refill.entries(groups), refill.prefilled(groups)
    columns = min(r.prefill_chunk or prompt_length(stage), prompt_length(stage))
    prompt, completion = prompts * prompt_length(stage) * column, slots * r.max_new_tokens * column
    second = 0 if refill else prompt + completion
    if refill and starts_with_half(layout, r.max_new_tokens):
        second = completion // 2
    scores = _decode_scores(stage, slots, prompts, group if refill else 1, r.max_new_tokens)
    logits = slots * c.padded_vocab // layout.tensor * wide
    return [
        Owner("decode weights", _local_bytes(copy) if is_copied else 0, "rollout"),
        Owner("prompt cache", prompt, "rollout"),
        Owner("completion cache", completion, "rollout"),
        Owner("prompt activations", prefilled * columns * _forward_column(stage, layout), "prefill"),
        # Of a fixed batch XLA turns the cache into the layout of the loop while that of the prefill is still there; a
        # ring that begins with half its columns stands beside the whole one while it is copied.
        Owner("second cache", second, "decode"),
        Owner("decode scores", scores * (2 * wide + item), "decode"),
        # Scaled and with their exponentials; truncation sorts them too.
        Owner("decode logits", logits * (5 if stage.online and stage.forwards["policy"].truncates else 3), "decode"),
    ]


def _decode_scores(stage: Stage, slots: int, entries: int, group: int, columns: int) -> int:
    """Numbers of one layer's attention at a step, over the ring and over the prompts."""
    c, layout, prompt = stage.session.model.config, stage.session.decode, prompt_length(stage)
    queries = c.num_heads // max(c.num_kv_heads, layout.tensor)
    meetings = slots
    if group > 1:
        meetings = entries * (slots if one_product(layout, slots, queries, entries, prompt) else group)
    return c.num_heads // layout.tensor * (slots * columns + meetings * prompt)


def _update_owners(stage: Stage) -> list[Owner]:
    session, batch, layout = stage.session, stage.config.batch, stage.session.train
    c, item = session.model.config, jnp.dtype(session.dtype).itemsize
    wide = jnp.dtype(wide_dtype(session.dtype)).itemsize
    minibatch = stage.rows_per_step // batch.minibatches
    micro = batch.micro_batch_rows or minibatch
    local_rows = micro // layout.data_shards
    activations = local_rows * (_kept_bytes_a_row(stage) + _bin_length(stage) * _backward_column(stage, layout))
    # Every data shard needs whole tables and layers: cast, and with their gradient in full precision before it is cut.
    table = c.padded_vocab * c.width // layout.tensor
    tables = table * (2 * wide + item * (wide != item) + wide * (not c.tied_embeddings))
    layer = sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(session.abstract_policy()["layers"]))
    tokens = local_rows * (row_length(stage) - prompt_length(stage) * stage.online)
    chunk = min(session.config.model.logits_chunk, tokens)
    blocks = count_blocks(c.padded_vocab, vocab_block(layout) or c.padded_vocab)
    gradients = _local_bytes(_abstract_trees(stage))
    return [
        Owner("gradients", gradients * (1 + (micro < minibatch)), "update"),
        Owner("gathered weights", tables + layer // layout.tensor * (wide + 2 * item), "update"),
        Owner("activations", activations, "update"),
        Owner("logits chunk", 3 * chunk * c.padded_vocab // blocks // layout.tensor * wide, "update"),
    ]


def _kept_bytes_a_row(stage: Stage) -> int:
    """What the backward pass keeps of a row's forward pass on the device that has the row, by what autodiff says."""
    session, length = stage.session, _bin_length(stage)
    c, layout, trees = session.model.config, session.train, _abstract_trees(stage)
    rows = TRACED_ROWS * layout.data_shards
    batch = {
        "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32),
        "valid": jax.ShapeDtypeStruct((rows, length), bool),
        "support": jax.ShapeDtypeStruct((rows, length), wide_dtype(session.dtype)),
    }

    if "teacher_topk" in stage.algorithm.needs:
        top_k = (rows, length, min(stage.config.teacher_top_k, c.vocab_size))
        batch["teacher_tokens"] = jax.ShapeDtypeStruct(top_k, jnp.int32)

    def residuals(params: Any, batch: Any) -> Any:
        def outputs(params: Any) -> Any:
            head_from = prompt_length(stage) if stage.online else 1
            return tree_outputs(stage.forwards, stage.algorithm, params, batch, head_from)

        return jax.vjp(outputs, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, trees, batch))
    weights = {x.shape for x in jax.tree.leaves(trees)} | {(layout.data_shards * c.padded_vocab, c.width)}
    by_tensor = {c.num_heads, c.ffn_width, max(c.num_kv_heads, layout.tensor)}
    sizes = (
        x.size * x.dtype.itemsize // (layout.tensor if by_tensor & set(x.shape[1:]) else 1)
        for x in kept
        if x.shape not in weights
    )
    return sum(sizes) // rows


def _abstract_trees(stage: Stage) -> dict[str, Any]:
    return {tree: stage.session.abstract_tree(model) for tree, model in stage.trees.items()}


def _forward_column(stage: Stage, layout: Layout) -> int:
    """Bytes a token while one layer runs forward: the residual stream, and attention scores or the feed-forward."""
    c, item = stage.session.model.config, jnp.dtype(stage.session.dtype).itemsize
    wide = jnp.dtype(wide_dtype(stage.session.dtype)).itemsize
    scores = c.num_heads * min(prompt_length(stage), QUERY_CHUNK) * (2 * wide + item)
    return 2 * c.width * wide + max(c.ffn_width * (wide + 2 * item), scores) // layout.tensor


def _backward_column(stage: Stage, layout: Layout) -> int:
    """Bytes a token while one layer runs backward, with everything that it computes again."""
    c, item = stage.session.model.config, jnp.dtype(stage.session.dtype).itemsize
    wide = jnp.dtype(wide_dtype(stage.session.dtype)).itemsize
    kernel = choose(stage.session.config.model.attention, layout, stage.session.dtype, _bin_length(stage), c.head_dim)
    scores = 3 * c.num_heads * min(_bin_length(stage), QUERY_CHUNK) * wide if kernel == "xla" else 0
    inner = 4 * c.ffn_width * item + 3 * c.num_heads * c.head_dim * wide
    return 4 * c.width * wide + (inner + scores) // layout.tensor


def _local_bytes(tree: Any) -> int:
    """Of one device's shards."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def peaks(owners: list[Owner]) -> dict[str, int]:
    """Bytes a device in each phase of a step."""
    found = {phase: [owner for owner in owners if owner.when in words] for phase, words in PHASES.items()}
    return {phase: sum(o.bytes for o in mine) for phase, mine in found.items() if any(o.when == phase for o in mine)}


def prompt_length(stage: Stage) -> int:
    return max(stage.config.data.prompt_lengths)


def row_length(stage: Stage) -> int:
    return stage.config.longest_row


def _bin_length(stage: Stage) -> int:
    """Tokens of a row as the model reads it, packed or not."""
    return stage.config.batch.row_length or row_length(stage)
