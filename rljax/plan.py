"""What a run will do, before it does it: the resolved config, the first prompts, and bytes a device by owner."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.config import Config, StageConfig, resolved
from rljax.data.batches import DataPosition, PromptSource, repeat_prompts
from rljax.models.params import param_shardings, parameter_count
from rljax.optim import make_optimizer, state_shardings
from rljax.runs import flatten
from rljax.session import Session
from rljax.setup import make_source, open_inputs

SHOWN_PROMPTS = 2


class PlanError(ValueError):
    """A plan that the devices cannot hold."""


def print_config(config: Config) -> None:
    for key, value in flatten(resolved(config)).items():
        print(f"config.{key} = {value!r}")


def dry_run(session: Session) -> int:
    """Print the plan. Loads data, tokenizer and shapes; makes no weights and compiles nothing. Raises PlanError."""
    config = session.config
    mesh = dict(session.train.mesh.shape)
    print(f"model: {parameter_count(session.model):,} parameters, {session.model.config}")
    print(f"mesh: training {mesh}, rollouts {dict(session.decode.mesh.shape)}, {jax.device_count()} devices")
    _, runner, evaluators = open_inputs(session)
    if runner is not None:
        runner.close()
    for split, evaluator in evaluators.items():
        print(f"{split}: {len(evaluator.source)} prompts ({evaluator.source.kept})")
    for name in config.recipe:
        stage = config.stage(name)
        source = make_source(session, stage)
        print(f"\nstage {name}: {stage.steps} steps of {stage.rows_per_step} rows; {source.kept}")
        _print_first_rows(session, stage, source)
        owners = bytes_by_owner(session, stage)
        total = sum(owners.values())
        print("  bytes a device, by owner:")
        for owner, size in owners.items():
            print(f"    {owner:<22}{size / 2**20:12.1f} MiB")
        print(f"    {'total':<22}{total / 2**20:12.1f} MiB")
        _check_memory(session, name, total, owners)
    return 0


def _print_first_rows(session: Session, stage: StageConfig, source: Any) -> None:
    _, batch, _ = source.take(DataPosition(), min(SHOWN_PROMPTS, len(source)))
    for tokens, valid, *rest in zip(*(np.asarray(leaf) for leaf in batch), strict=True):
        ids = tokens[valid]
        print(f"  {session.tokenizer.decode(ids)!r}")
        print(f"    ids {ids.tolist()}")
        print(f"    {len(ids)} of {len(tokens)} columns are tokens", end="")
        if isinstance(source, PromptSource):
            print(", left-padded")
        else:
            trained = tokens[rest[0]]
            print(f"; trained: {session.tokenizer.hf.decode(trained)!r}, last id {trained[-1]}")
    ends = ", ".join(f"{i} {session.tokenizer.hf.convert_ids_to_tokens(i)!r}" for i in session.tokenizer.end_ids)
    print(f"  end tokens: {ends}")
    if stage.is_online:
        _, prompts, _ = source.take(DataPosition(), stage.rollout.prompts_per_step)
        shape = repeat_prompts(prompts, stage.rollout.group_size).tokens.shape
        print(f"  rollout: prompts {list(shape)}, completions of at most {stage.rollout.max_new_tokens} tokens")


def bytes_by_owner(session: Session, stage: StageConfig) -> dict[str, int]:
    """An estimate from shapes and shardings alone: what lives on one device at the fullest moment of a stage."""
    c, b, r = session.model.config, stage.batch, stage.rollout
    compute, shards = jnp.dtype(session.dtype).itemsize, session.train.data_shards
    policy = session.abstract_policy()
    optimizer = make_optimizer({"policy": stage.optim}, 10**9)
    opt_state = jax.eval_shape(optimizer.init, {"policy": policy})
    where = state_shardings(
        opt_state, {"policy": param_shardings(session.model, session.train)}, session.train.replicated
    )
    owners = {"parameters": _bytes(policy), "optimizer": _bytes(opt_state, where), "gradients": _bytes(policy)}
    online = stage.is_online
    length = max(stage.data.prompt_lengths) + r.max_new_tokens if online else stage.data.row_length
    micro = (b.micro_batch_rows or stage.rows_per_step // b.minibatches) // shards
    kept = {"none": 14 * c.width + 4 * c.ffn_width, "dots": 6 * c.width + 3 * c.ffn_width, "block": c.width}
    layers = c.num_layers * kept[session.config.model.remat] + 14 * c.width + 4 * c.ffn_width
    owners["activations"] = micro * length * layers * compute // session.train.tensor
    chunk = min(session.config.model.logits_chunk, micro * length)
    owners["logits chunk"] = 3 * chunk * c.padded_vocab * 4 // session.train.tensor
    if online:
        if "ref_logprobs" in stage.algorithm().needs:
            owners["frozen reference"] = _bytes(session.abstract_policy(session.dtype))
        rows = stage.rows_per_step // session.decode.data_shards
        heads = max(c.num_kv_heads, session.decode.tensor) // session.decode.tensor
        token = 2 * c.num_layers * heads * c.head_dim * compute
        owners["decode weights"] = math.ceil(parameter_count(session.model) * compute / session.decode.tensor)
        owners["prompt cache"] = rows * max(stage.data.prompt_lengths) * token
        owners["completion cache"] = rows * r.max_new_tokens * token
    return owners


def _bytes(tree: Any, shardings: Any = None) -> int:
    """Of one device's shards."""
    leaves = jax.tree.leaves(tree)
    places = jax.tree.leaves(shardings) if shardings is not None else [leaf.sharding for leaf in leaves]
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in zip(leaves, places, strict=True))


def _check_memory(session: Session, name: str, total: int, owners: dict[str, int]) -> None:
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    if limit and total > limit:
        largest = max(owners, key=lambda owner: owners[owner])
        raise PlanError(
            f"stage {name} needs about {total / 2**30:.1f} GiB a device and there are {limit / 2**30:.1f}; "
            f"the largest part is {largest} ({owners[largest] / 2**30:.1f} GiB): use more devices, fewer rows "
            "a micro-batch or remat"
        )
