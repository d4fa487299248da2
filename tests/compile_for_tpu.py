"""Compiles rollout, scoring and update of a model for a TPU slice that is not there; prints what the compiler says.

python -m tests.compile_for_tpu v5e:4x4 qwen3-0.6b qwen3-8b
"""

import json
import math
import re
import sys
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import mesh_utils
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, Mesh

from rljax.config import default_config, make_config
from rljax.data.tokenizer import character_tokenizer
from rljax.models import FAMILIES
from rljax.models.decoder import Model
from rljax.session import Session
from rljax.sharding import DECODE_RULES, MESH_AXES, TRAIN_RULES, Layout, in_host_memory, parse_mesh, refactor_mesh
from rljax.stage_state import abstract_saved
from rljax.stages import Stage, build_stage
from rljax.types import Experience, Prompts

# The config.json of Qwen3-0.6B and -8B, as far as they differ, and what they share.
MODELS = {
    "qwen3-0.6b": (1024, 3072, 28, 16, True),
    "qwen3-8b": (4096, 12288, 36, 32, False),
}
SHARED = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6}
SHARED |= {"rope_theta": 1e6, "max_position_embeddings": 40960, "initializer_range": 0.02, "attention_bias": False}
PROGRAMS = ("rollout", "score", "update")
OFFLOADED = "qwen3-0.6b"  # compiled once more with moments and reference in the hosts' memory
PROMPT, COMPLETION, PROMPTS, GROUP, CHUNK = 256, 512, 32, 8, 256
# Training and decode mesh of each pair: decode cuts the devices so that weights, cache and training state fit.
MESHES = {
    ("v5e:4x4", "qwen3-0.6b"): ("1,16,1", "1,16,1"),
    ("v5e:4x4", "qwen3-8b"): ("1,4,4", "1,4,4"),
    ("v5p:2x4x4", "qwen3-0.6b"): ("1,32,1", "1,32,1"),
    ("v5p:2x4x4", "qwen3-8b"): ("1,32,1", "1,32,1"),
}
SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]+)\]")
ITEMS = {"pred": 1, "bf16": 2}
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
COLLECTIVE = re.compile(r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def train_shards(mesh: str) -> int:
    """A micro-batch has one row a data shard."""
    replica, fsdp, _ = map(int, mesh.split(","))
    return replica * fsdp


def open_stage(topology: str, name: str) -> Stage:
    """GRPO with KL on 32 prompts x 8, 256 + 512 tokens, in bfloat16; nothing is loaded or made."""
    width, ffn, layers, heads, tied = MODELS[name]
    own = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers}
    own |= {"num_attention_heads": heads, "tie_word_embeddings": tied}
    mesh, decode = MESHES[topology, name]
    raw = default_config("grpo")
    settings = {"algo.kl_coef": 0.01, "algo.clip_low": 0.2, "algo.clip_high": 0.2, "algo.advantage_mean": "group"}
    settings |= {"algo.advantage_std": "group", "algo.aggregation": "token_mean", "compute_dtype": "bfloat16"}
    settings |= {"rollout.prompts_per_step": PROMPTS, "rollout.group_size": GROUP, "steps": 100, "mesh": mesh}
    settings |= {"rollout.max_new_tokens": COMPLETION, "data.prompt_lengths": (PROMPT,), "model.remat": "block"}
    settings |= {"batch.micro_batch_rows": train_shards(mesh), "model.logits_chunk": CHUNK, "reward.names": ("gsm8k",)}
    raw.update_from_flattened_dict(settings)
    raw.tokenizer.path = "characters:ab"
    with raw.unlocked():
        raw.model.architecture = SHARED | own
    config = make_config(raw)
    devices = get_topology_desc(platform="tpu", topology_name=topology).devices
    grid = mesh_utils.create_device_mesh(parse_mesh(mesh, len(devices)), devices=devices)
    train = Layout(Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)), TRAIN_RULES)
    layouts = (train, Layout(refactor_mesh(train.mesh, decode), DECODE_RULES))
    family = FAMILIES["qwen3"]
    model = Model(family, family.from_hf(SHARED | own)).padded_for(*(layout.tensor for layout in layouts))
    session = Session(config, model, character_tokenizer("ab"), *layouts, epath.Path("unused"))
    return build_stage(session, config, 0, None, None)  # type: ignore[arg-type]


def placed(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def offloading(stage: Stage) -> Stage:
    """The same with moments and reference in the hosts' memory."""
    config = replace(stage.session.config, offload_optimizer=True, offload_reference=True)
    return build_stage(replace(stage.session, config=config), config, 0, None, None)  # type: ignore[arg-type]


def compile_programs(stage: Stage, names: tuple[str, ...] = PROGRAMS) -> dict[str, Any]:
    """Rollout, scoring and update, each fed with the shapes that the one before gives."""
    session = stage.session
    rows, whole = session.train.rows, session.train.replicated
    state = abstract_saved(stage)["train"]
    reference = session.abstract_policy(stage.frozen_dtype("reference"))
    if stage.config.offload_reference:
        reference = jax.tree.map(lambda x: x.update(sharding=in_host_memory(x.sharding)), reference)
    shape = (PROMPTS * GROUP, PROMPT)
    ids = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    prompts = Prompts(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool), ids, ids)
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), whole)
    version = placed(jax.eval_shape(lambda: jnp.int32(0)), whole)
    assert stage.generate is not None
    inputs = (state.params["policy"], placed(prompts, rows), key, version)
    rollout = placed(jax.eval_shape(stage.generate, *inputs), rows)
    lowered = {"rollout": stage.generate.lower(*inputs)}
    score = stage.program("score_reference", PROMPT)
    to_score = {"tokens": rollout.tokens, "valid": rollout.valid}
    scored = placed(jax.eval_shape(score, reference, to_score), rows)
    lowered["score"] = score.lower(reference, to_score)
    numbers = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    experience = Experience(rollout, numbers, jax.ShapeDtypeStruct(shape[:1], bool), ref_logprobs=scored)
    batch = placed(jax.eval_shape(stage.program("targets", PROMPT), state.algo_state, experience)[1], rows)
    lowered["update"] = stage.program("update", PROMPT, state).lower(state, batch, key)
    compiled = {}
    for name in names:
        start = time.perf_counter()
        compiled[name] = (lowered[name].compile(), time.perf_counter() - start)
    return compiled


def local_bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def largest_buffers(text: str, count: int = 4) -> list[str]:
    """What instructions of a compiled program write, largest first; fused intermediates are no buffers."""
    sizes: dict[str, int] = {}
    fused = False
    for line in text.splitlines():
        if line.endswith("{"):
            fused = "fused_computation" in line
        result = line.partition(" = ")[2]
        if result and not fused and not result.startswith("("):
            dtype, dims = SHAPE.match(result).groups() if SHAPE.match(result) else ("pred", "1")
            item = ITEMS.get(dtype) or int(dtype[1:]) // 8
            sizes[f"{dtype}[{dims}]"] = item * math.prod(map(int, dims.split(",")))
    return [f"{name} {size / 2**20:.0f} MiB" for name, size in sorted(sizes.items(), key=lambda s: -s[1])[:count]]


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of every computation of a compiled program."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line:
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def crossing_collectives(text: str, tensor: int) -> tuple[int, list[str]]:
    """How many collectives the loops of a program have, and those whose groups span data shards."""
    found = computations(text)
    waiting = [name for lines in found.values() for line in lines for name in re.findall(r"body=%?([\w.-]+)", line)]
    inside: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside.add(name)
            waiting += [n for line in found[name] for n in CALLED.findall(line) if n in found]
    collectives = [line for name in inside for line in found[name] if COLLECTIVE.search(line)]
    return len(collectives), [line.strip()[:300] for line in collectives if spans_shards(line, tensor)]


def spans_shards(line: str, tensor: int) -> bool:
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]+\})\}", line):
        groups = [[int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        dims = [int(n) for n in iota[3].split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose([int(n) for n in iota[4].split(",")]) if iota[4] else ids
        groups = ids.reshape(int(iota[1]), int(iota[2])).tolist()
    else:
        listed = re.search(r"replica_groups=\{(.*?)\}\}?,", line)
        groups = [[int(i) for i in g.split(",")] for g in re.findall(r"[\d,]+", listed[1])] if listed else []
        if not any(groups):
            return True  # all devices
    return any(len({i // tensor for i in group}) > 1 for group in groups)


def logits_buffers(text: str, stage: Stage) -> list[str]:
    """Shapes with a vocabulary axis, tables aside, and as many tokens as one row's completion has."""
    c, layout = stage.session.model.config, stage.session.train
    vocab = {c.padded_vocab, c.padded_vocab // layout.tensor}
    tables = {c.width, c.width // layout.data_shards}
    shapes = {tuple(map(int, dims.split(","))) for _, dims in SHAPE.findall(text)}
    others = {shape: math.prod(shape) // max(vocab & set(shape)) for shape in shapes if vocab & set(shape)}
    assert CHUNK in others.values()  # the chunks' logits are in there
    return [str(shape) for shape, size in others.items() if size >= COMPLETION and size not in tables]


def bytes_of(compiled: Any) -> int:
    """What a program takes of a chip, its arguments among it."""
    memory = compiled.memory_analysis()
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return own + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def main(topology: str, name: str) -> None:
    stage = open_stage(topology, name)
    session = stage.session
    state = abstract_saved(stage)["train"]
    held = {"state": local_bytes(state), "policy": local_bytes(state.params)}
    held["reference"] = local_bytes(session.abstract_policy(stage.frozen_dtype("reference")))
    # What a program's own arguments do not hold already.
    beside = {
        "rollout": held["state"] - held["policy"] + held["reference"],
        "score": held["state"],
        "update": held["reference"],
    }
    for program, (compiled, seconds) in compile_programs(stage).items():
        memory, text = compiled.memory_analysis(), compiled.as_text()
        record = {"topology": topology, "model": name, "program": program, "chips": session.train.mesh.size}
        record |= {
            "gib": (bytes_of(compiled) + beside[program]) / 2**30,
            "temporaries_gib": memory.temp_size_in_bytes / 2**30,
        }
        record |= {"compile_seconds": seconds, "largest": largest_buffers(text)}
        if program == "rollout":
            count, crossing = crossing_collectives(text, session.decode.tensor)
            # The one number a step by which data shards keep together (``uniform_steps``) is no traffic.
            rest = [line for line in crossing if " = s32[]" not in line]
            record |= {"loop_collectives": count, "crossing": rest, "uniform_steps": len(crossing) - len(rest)}
        else:
            record["logits"] = logits_buffers(text, stage)
            record["kernels"] = text.count('custom_call_target="tpu_custom_call"')
        print(json.dumps(record), flush=True)
    if name == OFFLOADED:
        for program, (compiled, seconds) in compile_programs(offloading(stage), ("score", "update")).items():
            host = compiled.memory_analysis().host_argument_size_in_bytes
            record = {"topology": topology, "model": name, "program": f"offloading {program}"}
            # Its own arguments and what stays on the chip beside them.
            policy = held["policy"] * (program == "score")
            record |= {"gib": (bytes_of(compiled) + policy) / 2**30, "host_gib": host / 2**30}
            print(json.dumps(record | {"compile_seconds": seconds}), flush=True)


if __name__ == "__main__":
    for model in sys.argv[2:]:
        main(sys.argv[1], model)
