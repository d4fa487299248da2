"""Compiles rollout, scoring and update of a model for a TPU slice that is not there; prints what the compiler says.

python -m tests.compile_for_tpu v5e:4x4 qwen3-0.6b qwen3-8b
"""

import json
import math
import sys
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import mesh_utils
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, Mesh

from rljax.config import default_config, make_config
from rljax.data.tokenizer import character_tokenizer
from rljax.models import FAMILIES
from rljax.models.decoder import Model
from rljax.session import Session
from rljax.sharding import (
    DECODE_RULES,
    MESH_AXES,
    TRAIN_RULES,
    VOCAB_BLOCK,
    Layout,
    in_host_memory,
    parse_mesh,
    refactor_mesh,
)
from rljax.stage_state import abstract_saved
from rljax.stages import Stage, build_stage
from rljax.types import Experience, Prompts
from tests.compiled_text import (
    SHAPE,
    largest_buffers,
    loop_collectives,
    moved_in_loops,
    sampling_bytes,
    spans_shards,
    written_in_loops,
)

# The config.json of Qwen3-0.6B and -8B, as far as they differ, and what they share.
MODELS = {
    "qwen3-0.6b": (1024, 3072, 28, 16, True),
    "qwen3-8b": (4096, 12288, 36, 32, False),
}
SHARED = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6}
SHARED |= {"rope_theta": 1e6, "max_position_embeddings": 40960, "initializer_range": 0.02, "attention_bias": False}
PROGRAMS = ("rollout", "score", "update")
OFFLOADED = "qwen3-0.6b"  # compiled once more with moments and reference in the hosts' memory
RING_KERNEL = ("v5e:4x4", "qwen3-8b")  # whose rollout is compiled once more with its kernel
PROMPT, COMPLETION, PROMPTS, GROUP, CHUNK = 256, 512, 32, 8, 256
# v5e-16 and v5p-32: 16 chips each, as the name of the latter counts the two cores of a chip. Training and decode mesh:
# decode cuts the devices so that weights, cache and training state fit.
MESHES = {
    ("v5e:4x4", "qwen3-0.6b"): ("1,16,1", "1,16,1"),
    ("v5e:4x4", "qwen3-8b"): ("1,4,4", "1,4,4"),
    ("v5p:2x2x4", "qwen3-0.6b"): ("1,16,1", "1,16,1"),
    ("v5p:2x2x4", "qwen3-8b"): ("1,16,1", "1,16,1"),
}


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


def with_ring_kernel(stage: Stage) -> Stage:
    """The same whose rollout attends over the ring in a kernel."""
    config = stage.session.config
    config = replace(config, rollout=replace(config.rollout, ring_attention="pallas"))
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


def logits_buffers(text: str, stage: Stage, layout: Layout, tokens: int) -> list[str]:
    """Shapes with a vocabulary axis, tables aside, and as many tokens as one row's completion has.

    ``tokens`` have their logits at once: they are in there.
    """
    c = stage.session.model.config
    tables = {c.width, c.width // stage.session.train.data_shards}
    shapes = {tuple(map(int, dims.split(","))) for _, dims in SHAPE.findall(text)}
    others = {shape: beside_vocabulary(shape, {c.padded_vocab, c.padded_vocab // layout.tensor}) for shape in shapes}
    assert tokens in others.values()
    return [str(shape) for shape, size in others.items() if size >= COMPLETION and size not in tables]


def beside_vocabulary(shape: tuple[int, ...], vocab: set[int]) -> int:
    """How many times an array holds the vocabulary, on one axis or in blocks of 128; 0: it does not."""
    blocks = {size // VOCAB_BLOCK for size in vocab} & set(shape) if VOCAB_BLOCK in shape else set()
    sizes = vocab & set(shape) | {size * VOCAB_BLOCK for size in blocks}
    return math.prod(shape) // max(sizes) if sizes else 0


def kernels(text: str) -> int:
    return text.count('custom_call_target="tpu_custom_call"')


def bytes_of(compiled: Any) -> int:
    """What a program takes of a chip, its arguments among it."""
    memory = compiled.memory_analysis()
    own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return own + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def rollout_record(stage: Stage, text: str) -> dict[str, Any]:
    """What the loops of a rollout say to each other and move."""
    c, layout = stage.session.model.config, stage.session.decode
    plan = stage.session.refill(stage.config, PROMPTS * GROUP, GROUP)
    assert plan is not None
    collectives = loop_collectives(text)
    crossing = [line.strip()[:300] for line in collectives if spans_shards(line, layout.tensor)]
    # The one number a step by which data shards keep together (``uniform_steps``) is no traffic.
    rest = [line for line in crossing if " = s32[]" not in line]
    heads = max(c.num_kv_heads // layout.tensor, 1)
    entries = plan.entries(PROMPTS // layout.data_shards)
    layers = [(plan.slots, heads, COMPLETION, c.head_dim), (entries, heads, PROMPT, c.head_dim)]
    cache = c.num_layers * min(map(math.prod, layers)) * 2
    return {
        "loop_collectives": len(collectives),
        "crossing": rest,
        "uniform_steps": len(crossing) - len(rest),
        "sampling_bytes": sampling_bytes(text, c.width),
        "masses_bytes": plan.slots * c.padded_vocab // VOCAB_BLOCK * 4,
        "cache_mib": cache / 2**20,
        "moved": moved_in_loops(text, cache),
        # Not of prefill, whose layers are one loop further in: its queries have the shape that a layer of prompts has.
        "layers_written": [line for line in written_in_loops(text, layers) if line.count("while/body") < 3],
        "logits": logits_buffers(text, stage, layout, plan.slots),
    }


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
            record |= rollout_record(stage, text)
        else:
            record["logits"] = logits_buffers(text, stage, session.train, CHUNK)
            record["kernels"] = kernels(text)
        print(json.dumps(record), flush=True)
    if (topology, name) == RING_KERNEL:
        compiled, seconds = compile_programs(with_ring_kernel(stage), ("rollout",))["rollout"]
        record = {"topology": topology, "model": name, "program": "rollout with a kernel"}
        record |= {"gib": (bytes_of(compiled) + beside["rollout"]) / 2**30, "compile_seconds": seconds}
        text = compiled.as_text()
        print(json.dumps(record | rollout_record(stage, text) | {"kernels": kernels(text)}), flush=True)
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
