"""What a command gets: exit code 2 and one sentence for a mistake, before anything is compiled or written."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import rljax.main
from rljax.compiles import CompileCounter
from rljax.config import make_config, parse, resolved
from rljax.data.arithmetic import ALPHABET
from rljax.data.tokenizer import character_tokenizer
from rljax.main import main
from rljax.models import llama
from rljax.models.decoder import Model
from rljax.models.hf_export import save_hf
from rljax.models.params import init_params
from rljax.sharding import TRAIN_RULES, Layout, make_mesh
from tests.tiny import ROOT, tiny_config

TINY = [
    *("--config", str(ROOT / "tests" / "configs" / "tiny.py")),
    *("--config.cpu_devices=8", "--config.compilation_cache=off", "--config.recipe=main"),
]
FROM_FOLDER = ["--config.model.architecture={}", "--config.tokenizer.path="]


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """The sentence that a command is refused with; nothing was compiled and no folder was made for it."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # main sets it for the process

    def run(*flags: str, folder: Path = tmp_path / "run") -> str:
        existed = folder.exists()
        compiles = CompileCounter()
        code = main(["rljax.main", *TINY, f"--config.output_dir={folder}", *flags])
        compiles.close()
        said = capsys.readouterr().err
        assert code == 2
        assert compiles.count == 0
        assert folder.exists() == existed
        assert re.fullmatch(r"error: [^\n]+\n", said), said
        return said

    return run


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--config.optim.lr=1"], "config.optim.lr: no such key; did you mean 'learning_rate'?"),
        (["--config.mesh=1,3,1"], "mesh '1,3,1' takes 3 devices and there are 8"),
        (["--config.mesh=1,-1,-1"], "mesh '1,-1,-1': sizes are positive, and at most one of them is -1"),
        (["--config.mesh=1,1,8"], "a tensor degree of 8 does not divide 4 query heads over 2 kv heads"),
        (["--config.decode_mesh=1,8"], "mesh '1,8' is not like '1,-1,4'"),
        (["--config.mesh=1,4,2", "--config.decode_mesh=1,2,4"], "cut the devices at places that do not nest"),
        (
            ["--config.rollout.prompts_per_step=4"],
            "rollout.prompts_per_step 4 is not a multiple of the mesh's 8",
        ),
        (["--config.batch.micro_batch_rows=4"], "micro-batches of 4 rows do not divide over 8 data shards"),
        (["--config.rollout.max_new_tokens=100"], "data.prompt_lengths 8 + rollout.max_new_tokens 100 is 108"),
        (["--config.model.architecture.model_type=gpt2"], "config.model.architecture.model_type is 'gpt2'"),
        (["--config.model.architecture.vocab_size=5"], "the model's embedding 5 rows; they do not belong together"),
        (["--config.model.architecture={'model_type': 'llama'}"], "the key 'num_attention_heads' is missing"),
        (["--config.model.architecture.hidden_size=abc"], "hidden_size is 'abc'; it is a whole number above 0"),
        (["--config.model.architecture.num_key_value_heads=3"], "4 query heads over 3 kv heads"),
        (["--config.model.architecture.rope_theta=none"], "rope_theta is 'none'; it is a number"),
        (["--config.data.options.dificulty=4"], "no such key; did you mean 'difficulty'?"),
        (["--config.data.options.level=4"], "the task arithmetic has no option 'level'; it has count, seed"),
        (["--config.data.options.seed=x"], "option seed of the task arithmetic is 'x'; it takes int"),
        (["--config.tokenizer.path=characters:aa"], "the alphabet 'aa' has a character twice"),
        (["--config.tokenizer.path=/nowhere"], "tokenizer folder /nowhere does not exist"),
        (["--config.data.prompt_lengths=2"], "none of 48 rows fits 2 tokens"),
        (["--config.data.train=/nowhere/train.jsonl"], "data file /nowhere/train.jsonl does not exist"),
        (["--config.data.train="], "config.data.train is not set"),
        (["--config.reward.names=gsmk"], "there is no reward 'gsmk'; the nearest is 'gsm8k'"),
        (["--config.reward.names=nosuch.module:f"], "cannot import 'nosuch.module'"),
        (["--config.reward.names=math:pi"], "reward 'math:pi' is 3.14159"),
        (["--config.reward.names=required_words"], "reward 'required_words' fails on a row of the data"),
        (["--config.reward.names=length_cost"], "reward length_cost needs the option 'per_token'"),
        (
            ["--config.reward.names=rljax.rewards.text:length_cost", "--config.reward.options.length_cost.per_tokn=1"],
            "there is no option of length_cost 'per_tokn'; the nearest is 'per_token'",
        ),
        (["--config.distributed=here"], "config.distributed is 'here'; it is like 10.0.0.1:8476,4,0"),
        ([*FROM_FOLDER, "--config.model.path=/nowhere"], "/nowhere does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_half_done(refused, flags, sentence):
    assert sentence in refused(*flags)


@pytest.mark.parametrize(
    ("text", "flags", "sentence"),
    [
        ("", [], "is empty"),
        ('{"prompt": "1+1=", "answer": 2}\n{"prompt": \n', [], "is malformed at line 2"),
        ('{"prompt": "1+1=", "answer": 2}\n[1]\n', [], "has a list at line 2 where a row must be an object"),
        ('{"question": "1+1="}\n' * 9, [], "row 0 has neither 'prompt' nor 'messages'; it has question"),
        ('{"text": "1+1="}\n', ["--config.data.columns.prompt=question"], "has no column 'question' for 'prompt'"),
        ('{"prompt": "1+1="}\n' * 8, [], "config.data.dev_rows is 8"),
    ],
)
def test_a_data_file_that_cannot_be_used_is_named_with_the_place(refused, tmp_path, text, flags, sentence):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    said = refused(f"--config.data.train={file}", "--config.data.dev=", "--config.data.test=", *flags)
    assert sentence in said


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "1+1=", "chosen": "#2"}, "row 1 has no 'rejected'; it has prompt, chosen"),
        ({"prompt": "1+1=", "chosen": "#2", "rejected": "#2"}, "chosen and rejected of row 1 are equal"),
        ({"prompt": "1+1=", "chosen": 2, "rejected": 3}, "an answer of row 1 is 2; it is a text"),
        ({"prompt": "1+1=", "completions": ["#2"], "scores": [1]}, "row 1 has 1 answers to rank; give two or more"),
        ({"prompt": "1+1=", "completion": "#2", "label": 1}, "row 1 has one answer and a label"),
    ],
)
def test_a_comparison_that_cannot_be_used_is_named_with_its_file(refused, tmp_path, row, sentence):
    """In the training file, and in the one held out."""
    whole = {"prompt": "1+1=", "chosen": "#2", "rejected": "#3"}
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(f"{json.dumps(whole)}\n" * 16)
    bad.write_text(f"{json.dumps(whole)}\n{json.dumps(row)}\n")
    algo = ["--config.algo.name=dpo", "--config.algo.beta=0.1", "--config.batch.rows=16", "--config.data.options={}"]
    shared = [*algo, "--config.data.dev=", "--config.data.dev_rows=0", "--config.data.test_rows=0"]
    for train, test in ((bad, ""), (good, bad)):
        said = refused(*shared, f"--config.data.train={train}", f"--config.data.test={test}")
        assert sentence in said and f"(rows of {bad}, counted from 0)" in said


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A whole Hugging Face folder of a tiny model."""
    tokenizer = character_tokenizer(ALPHABET)
    architecture = tiny_config().model.architecture.to_dict() | {"vocab_size": tokenizer.vocab_size}
    layout = Layout(make_mesh("1,1,1", jax.devices()[:1]), TRAIN_RULES)
    model = Model(llama, llama.from_hf(architecture))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_hf(folder, model, init_params(model, layout, 0), tokenizer=tokenizer.hf)
    return folder


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_a_model_folder_without_a_file_is_refused(refused, folder):
    flags = [*FROM_FOLDER, f"--config.model.path={folder}"]
    (folder / "model.safetensors").rename(folder / "elsewhere")
    assert f"{folder} has neither model.safetensors nor model.safetensors.index.json" in refused(*flags)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(*flags)


def test_a_truncated_safetensors_file_is_refused(refused, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = refused(*FROM_FOLDER, f"--config.model.path={folder}")
    assert f"{file} is cut off or no safetensors file" in said


def test_a_family_that_is_not_here_is_refused(refused, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    tokenizer = f"--config.tokenizer.path=characters:{ALPHABET}"
    said = refused(FROM_FOLDER[0], tokenizer, f"--config.model.path={folder}")
    assert "no family for model_type 'gpt2'; there are llama" in said


def test_a_tokenizer_larger_than_the_embedding_or_without_an_end_is_refused(refused, folder, tmp_path):
    large = tmp_path / "large"
    character_tokenizer(ALPHABET + "abcdefghijklmnopqrstuvwxyz").hf.save_pretrained(large)
    flags = [FROM_FOLDER[0], f"--config.model.path={folder}"]
    assert "they do not belong together" in refused(*flags, f"--config.tokenizer.path={large}")
    settings = json.loads((large / "tokenizer_config.json").read_text())
    (large / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    assert "has no end token; name one with end_tokens" in refused(*flags, f"--config.tokenizer.path={large}")


DISTILLATION = {"name": "distillation", "beta": 0.5}
RTO = {
    **{"name": "rto", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean", "kl_coef": 0.05},
    **{"value_coef": 0.1, "value_clip": 0.2, "gamma": 1.0, "lam": 0.95, "whiten_advantages": "minibatch"},
    **{"guide_coef": 0.05, "guide_clamp": 0.05},
}


@pytest.mark.parametrize(
    ("role", "algo"), [("teacher_from", DISTILLATION), ("guide_from", RTO), ("reward_model_from", {"name": "grpo"})]
)
def test_a_model_with_another_vocabulary_is_refused(refused, folder, role, algo):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    said = refused(*(f"--config.algo.{key}={value}" for key, value in algo.items()), f"--config.{role}={folder}")
    vocabulary = f"{folder} has a vocabulary of {config['vocab_size'] + 1} and the policy one of {config['vocab_size']}"
    assert f"error: {vocabulary}; models that score the same tokens share a tokenizer" in said


def test_a_folder_of_another_run_is_refused_and_left_alone(refused, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    ours = resolved(parse([*TINY]).config)
    (folder / "config.json").write_text(json.dumps(ours | {"seed": 7}))
    said = refused(folder=folder)
    assert f"output_dir {folder} belongs to another run: seed is 7 there and 0 here" in said
    assert json.loads((folder / "config.json").read_text())["seed"] == 7
    stranger = tmp_path / "thesis"
    stranger.mkdir()
    (stranger / "chapter.tex").touch()
    assert "holds 'chapter.tex' but no config.json of a run" in refused(folder=stranger)
    assert [file.name for file in stranger.iterdir()] == ["chapter.tex"]


def test_a_disk_that_is_too_small_is_refused(refused, monkeypatch):
    monkeypatch.setattr("rljax.runs.shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    assert "has 0.000 GiB free and the run needs" in refused()


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(config):
        return np.zeros(-1)  # raises ValueError inside NumPy: not for a user to read

    monkeypatch.setattr(rljax.main, "start_devices", lambda config: None)
    monkeypatch.setattr(rljax.main, "open_session", broken)
    with pytest.raises(ValueError, match="negative dimensions"):
        main(["rljax.main", *TINY, f"--config.output_dir={tmp_path / 'run'}"])


def test_print_config_shows_every_stage_whole_and_starts_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(rljax.main, "start_devices", None)
    flags = [*TINY, "--config.recipe=warm_start,main", f"--config.output_dir={tmp_path / 'run'}"]
    assert main(["rljax.main", *flags, "--print_config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "config.optim.learning_rate = 0.01" in lines
    assert "config.stages.warm_start.algo.name = 'sft'" in lines
    assert "config.stages.warm_start.rollout.group_size = 2" in lines  # from the top level
    assert len(lines) == len(set(lines))
    # What it prints is the config.
    shown: dict[str, Any] = {}
    for line in lines:
        key, _, value = line.removeprefix("config.").partition(" = ")
        *above, last = key.split(".")
        place = shown
        for name in above:
            place = place.setdefault(name, {})
        place[last] = ast.literal_eval(value)
    assert make_config(shown) == parse(flags).config
    assert not (tmp_path / "run").exists()


def test_help_says_how(capsys):
    assert main(["rljax.main", "--help"]) == 0
    assert "--config.KEY=VALUE" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--config.optim.lr=1"], ["--config.reward.names=gsmk"]])
def test_from_a_shell_the_exit_code_is_2_and_stdout_stays_empty(flags, tmp_path):
    command = [sys.executable, "-m", "rljax.main", *TINY, f"--config.output_dir={tmp_path / 'run'}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
