"""Compiles rollout, scoring and update of a model for a TPU slice that is not there; prints what the compiler says.

python -m tests.compile_for_tpu v5e:4x4 qwen3-8b
"""

import json
import math
import re
import sys
import time
from pathlib import Path
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
from rljax.sharding import DECODE_RULES, MESH_AXES, TRAIN_RULES, Layout, parse_mesh, refactor_mesh
from rljax.stages import Stage, build_stage
from rljax.types import Experience, Prompts

# The config.json of Qwen3-0.6B and -8B, as far as they differ, and what they share.
MODELS = {
    "qwen3-0.6b": (1024, 3072, 28, 16, True),
    "qwen3-8b": (4096, 12288, 36, 32, False),
}
SHARED = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6}
SHARED |= {"rope_theta": 1e6, "max_position_embeddings": 40960, "initializer_range": 0.02, "attention_bias": False}
PROMPT, COMPLETION, PROMPTS, GROUP = 256, 512, 32, 8
# Training and decode mesh of each pair: decode cuts the devices so that weights, cache and training state fit.
MESHES = {
    ("v5e:4x4", "qwen3-0.6b"): ("1,16,1", "1,16,1"),
    ("v5e:4x4", "qwen3-8b"): ("1,4,4", "1,4,4"),
    ("v5p:2x4x4", "qwen3-0.6b"): ("1,32,1", "1,32,1"),
    ("v5p:2x4x4", "qwen3-8b"): ("1,32,1", "1,32,1"),
}
SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]+)\]")
ITEMS = {"pred": 1, "bf16": 2}


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
    settings |= {"batch.micro_batch_rows": 32, "model.logits_chunk": 512, "reward.names": ("gsm8k",)}
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


def compile_programs(stage: Stage) -> dict[str, Any]:
    """Rollout, scoring and update, each fed with the shapes that the one before gives."""
    session = stage.session
    rows, whole = session.train.rows, session.train.replicated
    state = stage.abstract_saved()["train"]
    reference = session.abstract_policy(stage.reference_dtype)
    shape = (PROMPTS * GROUP, PROMPT)
    ids = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    prompts = Prompts(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool), ids, ids)
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), whole)
    version = placed(jax.eval_shape(lambda: jnp.int32(0)), whole)
    assert stage.generate is not None
    inputs = (state.params["policy"], placed(prompts, rows), key, version)
    rollout = placed(jax.eval_shape(stage.generate, *inputs), rows)
    lowered = {"rollout": stage.generate.lower(*inputs)}
    score = stage.program("score", PROMPT)
    to_score = {"tokens": rollout.tokens, "valid": rollout.valid}
    scored = placed(jax.eval_shape(score, reference, to_score), rows)
    lowered["score"] = score.lower(reference, to_score)
    numbers = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    experience = Experience(rollout, numbers, jax.ShapeDtypeStruct(shape[:1], bool), ref_logprobs=scored)
    batch = placed(jax.eval_shape(stage.program("targets", PROMPT), state.algo_state, experience)[1], rows)
    lowered["update"] = stage.program("update", PROMPT, state).lower(state, batch, key)
    compiled = {}
    for name, program in lowered.items():
        start = time.perf_counter()
        compiled[name] = (program.compile(), time.perf_counter() - start)
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


def main(topology: str, name: str) -> None:
    stage = open_stage(topology, name)
    session = stage.session
    state = stage.abstract_saved()["train"]
    held = {"state": local_bytes(state), "policy": local_bytes(state.params)}
    held["reference"] = local_bytes(session.abstract_policy(stage.reference_dtype))
    # What a program's own arguments do not hold already.
    beside = {
        "rollout": held["state"] - held["policy"] + held["reference"],
        "score": held["state"],
        "update": held["reference"],
    }
    for program, (compiled, seconds) in compile_programs(stage).items():
        memory, text = compiled.memory_analysis(), compiled.as_text()
        own = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        own += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        Path(f"/tmp/{topology}-{name}-{program}.txt").write_text(text)
        record = {"topology": topology, "model": name, "program": program, "chips": session.train.mesh.size}
        record |= {"gib": (own + beside[program]) / 2**30, "temporaries_gib": memory.temp_size_in_bytes / 2**30}
        record |= {"compile_seconds": seconds, "largest": largest_buffers(text)}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
