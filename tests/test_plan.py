"""What --dry_run prints, what it costs (nothing is compiled or written), and how near its estimate is."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rljax.compiles import CompileCounter
from rljax.config import make_config
from rljax.main import main
from rljax.memory_plan import Owner, bytes_by_owner, peaks
from rljax.session import open_session
from rljax.setup import make_source
from rljax.stage_state import abstract_saved
from rljax.stages import Stage, build_stage
from rljax.types import Prompts
from tests.tiny import ROOT, tiny_config

IN_PROCESS = ("--config.cpu_devices=8", "--config.compilation_cache=off")
TINY = ("--config", str(ROOT / "tests" / "configs" / "tiny.py"), *IN_PROCESS)


@pytest.fixture
def planned(capsys, monkeypatch, tmp_path):
    """What a dry run says and its exit code; it compiles nothing and leaves nothing."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))

    def run(*flags: str) -> tuple[int, str, str]:
        compiles = CompileCounter()
        code = main(["rljax.main", *flags, f"--config.output_dir={tmp_path / 'run'}", "--dry_run"])
        compiles.close()
        assert compiles.count == 0
        assert not (tmp_path / "run").exists()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_plan_shows_prompts_masks_end_token_and_owners(planned):
    code, out, err = planned(*TINY)
    assert (code, err) == (0, "")
    assert "mesh: training {'replica': 1, 'fsdp': 8, 'tensor': 1}" in out
    assert "end tokens: 2 '<eos>'" in out
    warm_start, online = out.split("\nstage main:")
    # A supervised row: prompt, worked steps, end token; trained is what stands behind the prompt.
    row = re.search(r"valid 1 x (\d+), 0 x \d+, trained 0 x (\d+), 1 x (\d+), 0 x \d+, ends with 2 '<eos>'", warm_start)
    valid, prompt, trained = map(int, row.groups())
    assert valid == prompt + trained
    # A prompt: left-padded, decoded, nothing trained yet.
    assert re.search(r"'<bos>\d+[+-].*'\n    ids \[1, .*\]\n    valid 0 x \d, 1 x \d, trained 0 x 8\n", online)
    assert "rows [16, 16] (8 prompts x 2, 8 + 8 tokens), 2 x 1 optimizer steps, micro-batches [8, ...]" in online
    owners = re.findall(r"^    (?:always|rollout|prefill|decode|update) +([a-z ]+?) +\d+\.\d+$", online, re.MULTILINE)
    assert owners == [
        *("parameters", "optimizer state", "frozen reference", "decode weights", "prompt cache", "completion cache"),
        *("prompt activations", "second cache", "decode scores", "decode logits"),
        *("gradients", "gathered weights", "activations", "logits chunk", "all", "all", "all"),
    ]


def test_a_plan_above_the_memory_of_the_device_is_refused(planned):
    code, out, err = planned(*TINY, "--config.device_memory_gib=0.0001")
    assert code == 2
    assert re.fullmatch(
        r"error: stage warm_start needs about .* GiB a device in update and there are 0\.0001, .* model\.remat=block\n",
        err,
    )
    assert "activations" in out  # the plan itself is shown first


def test_peaks_are_sums_over_those_who_are_there_at_once():
    owners = [Owner("a", 1, "always"), Owner("b", 2, "rollout"), Owner("c", 4, "prefill"), Owner("d", 8, "decode")]
    assert peaks(owners) == {"prefill": 1 + 2 + 4, "decode": 1 + 2 + 8}
    assert peaks([*owners, Owner("e", 16, "update")])["update"] == 1 + 16
    assert peaks([Owner("a", 1, "always"), Owner("e", 16, "update")]) == {"update": 17}  # supervised


def make_stage(**overrides) -> Stage:
    """Large enough that activations, tables and caches weigh something."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 160, "head_dim": 16}
    architecture = sizes | {"max_position_embeddings": 512, "vocab_size": 2000}
    raw = tiny_config(
        **{
            "recipe": ("main",),
            "data.prompt_lengths": (64,),
            "rollout.max_new_tokens": 64,
            "rollout.prompts_per_step": 16,
            "rollout.group_size": 4,
            "batch.minibatches": 1,
            "algo.kl_coef": 0.0,
            "model.logits_chunk": 64,
            **overrides,
        }
    )
    raw.model.architecture = raw.model.architecture.to_dict() | architecture
    session = open_session(make_config(raw))
    return build_stage(session, session.config, 0, make_source(session, session.config), None)


def placed(stage: Stage, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=stage.session.train.rows)


def used(compiled) -> int:
    """Bytes of a program on one device, by the compiler."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def compiled_update(stage: Stage) -> int:
    state, rows, columns = abstract_saved(stage)["train"], stage.rows_per_step, 128
    dtypes = {"tokens": jnp.int32, "valid": bool, "loss_mask": bool}
    dtypes |= dict.fromkeys(("behavior_logprobs", "advantages", "support"), jnp.float32)
    batch = {name: placed(stage, (rows, columns), dtype) for name, dtype in dtypes.items()}
    return used(stage.program("update", 64, state).lower(state, batch, abstract_key(stage)).compile())


def compiled_rollout(stage: Stage) -> int:
    rows, everywhere = stage.rows_per_step, stage.session.train.replicated
    prompts = Prompts(
        placed(stage, (rows, 64), jnp.int32),
        placed(stage, (rows, 64), bool),
        placed(stage, (rows,), jnp.int32),
        placed(stage, (rows,), jnp.int32),
    )
    version = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    policy = stage.session.abstract_policy()
    return used(stage.generate.lower(policy, prompts, abstract_key(stage), version).compile())


def abstract_key(stage: Stage) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=stage.session.train.replicated)


@pytest.mark.parametrize(
    "settings",
    [
        {"mesh": "1,2,4", "model.remat": "block"},
        {"mesh": "1,4,2", "model.remat": "dots", "batch.micro_batch_rows": 16},
    ],
    ids=str,
)
def test_the_estimate_is_within_a_factor_of_what_the_compiler_takes(settings, capsys):
    """1.5 either way. Both differ in kind: the compiler fuses, reuses and pads, the plan adds up who needs what."""
    stage = make_stage(**settings)
    owners = bytes_by_owner(stage)
    by_name = {owner.name: owner.bytes for owner in owners}
    planned = peaks(owners)
    # The optimizer's state is no argument of the rollout program, but it is there.
    for phase, estimate, taken in (
        ("update", planned["update"], compiled_update(stage)),
        ("rollout", max(planned["prefill"], planned["decode"]), compiled_rollout(stage) + by_name["optimizer state"]),
    ):
        with capsys.disabled():
            print(f"\n{settings} {phase}: plan {estimate / 2**20:.1f} MiB, compiler {taken / 2**20:.1f} MiB")
        assert 1 / 1.5 < estimate / taken < 1.5


def test_the_train_state_is_counted_to_the_byte():
    stage = make_stage(mesh="1,4,2")
    state = stage.start({"policy": stage.session.base_params()})
    device = stage.session.train.mesh.devices.flat[0]

    def on_device(tree) -> int:
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device]
        return sum(shard.data.nbytes for shard in shards)

    owners = {owner.name: owner.bytes for owner in bytes_by_owner(stage)}
    assert owners["parameters"] == on_device(state.params)
    assert owners["optimizer state"] == on_device(state.opt_state)


def test_the_caches_by_hand():
    """4 layers, keys and values, 2 kv heads over tensor 2, width 16, float32; 16 prompts x 4 samples.

    4 data shards: 16 slots each, and room for 16 / 4 prompts and one to spare, of which there are 4. 2 data shards: 32
    slots, 8 prompts of at most 9.
    """
    owners = {owner.name: owner.bytes for owner in bytes_by_owner(make_stage(mesh="1,4,2"))}
    column = 4 * 2 * (2 // 2) * 16 * 4
    assert owners["completion cache"] == 16 * 64 * column
    assert owners["prompt cache"] == 4 * 64 * column
    # int8: a head's row of 16 numbers and its scale, and weights of a byte with a scale an output channel. Without
    # evaluations, which are never rounded and would take more.
    int8 = {"rollout.weights_dtype": "int8", "rollout.cache_dtype": "int8", "algo.correction": "truncated"}
    int8 |= {"data.dev": "", "data.test": "", "data.dev_rows": 0}
    rounded = {owner.name: owner.bytes for owner in bytes_by_owner(make_stage(mesh="1,4,2", **int8))}
    assert rounded["completion cache"] == owners["completion cache"] * (16 + 4) // (16 * 4)
    weights = 4 * (64 * 4 * 16 * 2 + 64 * 2 * 16 * 2 + 3 * 64 * 160)
    scales = 4 * (4 * 16 + 2 * 2 * 16 + 2 * 160) // 2 + 4 * (2 * 64)  # of what goes out over heads or the width
    saved = owners["decode weights"] - rounded["decode weights"]
    assert saved == weights // 2 * 3 - scales * 4
    # kv heads fewer than tensor are there once for each shard.
    owners = {owner.name: owner.bytes for owner in bytes_by_owner(make_stage(mesh="1,2,4"))}
    assert owners["completion cache"] == 32 * 64 * column
    assert owners["prompt cache"] == 8 * 64 * column
    # A fixed batch has a prompt's columns for every row.
    owners = {owner.name: owner.bytes for owner in bytes_by_owner(make_stage(mesh="1,4,2", **{"rollout.slots": 0}))}
    assert owners["prompt cache"] == owners["completion cache"] == (64 // 4) * 64 * column


def test_the_cache_of_a_cpu_is_float32_and_its_first_half_stands_beside_the_whole():
    """bfloat16 compute, 128 columns of the ring: a row of 16 numbers takes 64 bytes, and 64 more columns a while."""
    settings = {"mesh": "1,4,2", "compute_dtype": "bfloat16", "rollout.max_new_tokens": 128}
    owners = {owner.name: owner.bytes for owner in bytes_by_owner(make_stage(**settings))}
    column = 4 * 2 * (2 // 2) * 16 * 4
    assert owners["completion cache"] == 16 * 128 * column
    assert owners["second cache"] == 16 * 64 * column
    # A fixed batch has its cache in the compute dtype, in two layouts for a while.
    owners = {owner.name: owner.bytes for owner in bytes_by_owner(make_stage(**settings, **{"rollout.slots": 0}))}
    assert owners["completion cache"] == 16 * 128 * column // 2
    assert owners["second cache"] == 16 * (64 + 128) * column // 2


def test_the_scores_of_a_step_by_hand(monkeypatch):
    """4 heads over tensor 2, 16 slots in groups of 4, 4 prompts of 64, a ring of 64: float32 three times."""
    settings = {"mesh": "1,4,2", "data.dev": "", "data.test": "", "data.dev_rows": 0}

    def scores():
        return {owner.name: owner.bytes for owner in bytes_by_owner(make_stage(**settings))}["decode scores"]

    assert scores() == 2 * 16 * (64 + 4 * 64) * 12  # all slots meet all prompts
    monkeypatch.setattr("rljax.models.segments.MOST_SCORES", 0)
    assert scores() == 2 * (16 * 64 + 4 * 4 * 64) * 12  # each prompt meets its group


def assemble(data_dir: Path, folder: Path, model: str, tokenizer: str) -> Path:
    """A model folder without weights: what a plan has to do with."""
    shutil.copytree(data_dir / "tokenizers" / tokenizer, folder)
    for file in (folder, *folder.iterdir()):
        file.chmod(0o755)  # the data may be read-only
    shutil.copy(data_dir / "configs" / model / "config.json", folder / "config.json")
    return folder


def test_gsm8k_on_one_accelerator_is_planned_without_weights(planned, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("RLJAX_DATA", str(data_dir))
    folder = assemble(data_dir, tmp_path / "model", "Qwen--Qwen2.5-0.5B-Instruct", "qwen2")
    file = str(ROOT / "configs" / "gsm8k_grpo_qwen2p5_0p5b.py")
    code, out, err = planned("--config", file, *IN_PROCESS, f"--config.model.path={folder}")
    assert (code, err) == (0, "")
    assert "model: 494,032,768 parameters" in out
    assert "test: 1319 rows kept, 0 dropped" in out
    assert "end tokens: 151645 '<|im_end|>'" in out
    assert "<|im_start|>system\\nPlease reason step by step" in out and out.count("<|im_start|>assistant\\n'") == 2


def test_gsm8k_on_a_v5e_slice_fits_its_chips(data_dir, tmp_path):
    """On 16 simulated devices, in a process of its own."""
    folder = assemble(data_dir, tmp_path / "model", "Qwen--Qwen3-8B", "qwen3")
    flags = ["--config.cpu_devices=16", f"--config.model.path={folder}", f"--config.output_dir={tmp_path / 'run'}"]
    file = "configs/gsm8k_grpo_qwen3_8b_v5e_16.py"
    done = subprocess.run(
        [sys.executable, "-m", "rljax.main", "--config", file, *flags, "--dry_run"],
        cwd=ROOT,
        env={**os.environ, "RLJAX_DATA": str(data_dir)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "model: 8,190,735,360 parameters" in done.stdout
    assert "mesh: training {'replica': 1, 'fsdp': 4, 'tensor': 4}" in done.stdout
    assert re.search(r"^    always   parameters +1\.9\d\d$", done.stdout, re.MULTILINE)  # 8.2e9 x 4 bytes / 16
    totals = [float(x) for x in re.findall(r"^    \w+ +all +([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(totals) == 3 and max(totals) < 15.75 < 16
    assert not (tmp_path / "run").exists()
