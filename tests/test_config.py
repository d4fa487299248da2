"""From a config file and the command line to frozen dataclasses: what is taken, what is refused, and how."""

import importlib.util
import typing
from pathlib import Path

import pytest

from rljax.algos import grpo, policy
from rljax.config import ConfigError, default_config, identity_keys, make_config, parse, resolved
from rljax.config.build import hints
from rljax.config.fields import ModelConfig
from rljax.losses.advantages import MEANS, SCALES
from rljax.losses.masked import AGGREGATIONS
from rljax.models.decoder import REMAT_POLICIES
from rljax.rewards import Sample
from rljax.setup import make_runner
from tests.tiny import ROOT, tiny_config

TINY = str(ROOT / "tests" / "configs" / "tiny.py")

pytestmark = pytest.mark.fast


def parsed(*flags: str):
    return parse(["--config", TINY, *flags]).config


def at(config, path: str):
    for name in path.split("."):
        config = config[name] if isinstance(config, dict) else vars(config)[name]
    return config


@pytest.mark.parametrize(
    ("flags", "path", "value"),
    [
        (["--config.steps=3"], "steps", 3),
        (["--config.steps", "3"], "steps", 3),
        (["--config.steps=3", "--config.steps=4"], "steps", 4),
        (["--config.mesh=1,-1,4"], "mesh", "1,-1,4"),
        (["--config.mesh", "1,-1,4"], "mesh", "1,-1,4"),
        (["--config.decode_mesh", "-1,1,2"], "decode_mesh", "-1,1,2"),
        (["--config.name=a=b"], "name", "a=b"),
        (["--config.optim.learning_rate=1"], "optim.learning_rate", 1.0),
        (["--config.optim.learning_rate=1e-6"], "optim.learning_rate", 1e-6),
        (["--config.checkpoint.export=false"], "checkpoint.export", False),
        (["--config.profile_steps=2,4"], "profile_steps", (2, 4)),
        (["--config.profile_steps=(2, 4)"], "profile_steps", (2, 4)),
        (["--config.profile_steps="], "profile_steps", ()),
        (["--config.reward.names=gsm8k,think_format"], "reward.names", ("gsm8k", "think_format")),
        (["--config.reward.names=['a,b']"], "reward.names", ("a,b",)),
        (["--config.reward.names=a,b", "--config.reward.weights=1,0.5"], "reward.weights", (1.0, 0.5)),
        (
            ["--config.reward.names=a", "--config.reward.options.a.per_token=1e-3"],
            "reward.options",
            {"a": {"per_token": 1e-3}},
        ),
        (["--config.data.options.difficulty=4"], "data.options", {"difficulty": 4}),
        (["--config.data.options.path=a,b"], "data.options", {"difficulty": 1, "path": "a,b"}),
        (["--config.data.options={'count': 2}"], "data.options", {"count": 2}),
        (["--config.data.columns.prompt=question"], "data.columns", {"prompt": "question"}),
        (["--config.model.architecture.hidden_size=64"], "model.architecture.hidden_size", 64),
        (["--config.algo.dual_clip=3"], "algo.dual_clip", 3.0),
        (["--config.algo.dual_clip=none"], "algo.dual_clip", None),
        (["--config.stages.warm_start.optim.learning_rate=0.5"], "stages.warm_start.optim.learning_rate", 0.5),
        (["--config.stages.warm_start.data.train_rows=16"], "stages.warm_start.data.train_rows", 16),
        (["--config.recipe=main"], "recipe", ("main",)),
    ],
)
def test_an_override_arrives_as_the_type_of_its_field(flags, path, value):
    found = at(parsed(*flags), path)
    assert found == value and type(found) is type(value)


def test_a_stage_takes_from_the_top_level_what_it_does_not_set_itself():
    config = parsed("--config.optim.b1=0.8", "--config.data.seed=7")
    warm_start = config.stages["warm_start"]
    assert warm_start.optim.b1 == config.optim.b1 == 0.8
    assert warm_start.data.seed == config.data.seed == 7
    assert (warm_start.optim.learning_rate, warm_start.steps) == (1e-2, 3)


def test_another_algorithm_starts_from_its_own_defaults_and_asks_for_what_it_has_none_for():
    alone = ["--config.recipe=main", "--config.batch.rows=16"]
    plain = {"loss": "nll", "reduction": "token_mean", "label_smoothing": 0.0, "z_loss_coef": 0.0}
    assert resolved(parsed("--config.algo.name=sft", *alone))["algo"] == {"name": "sft", **plain}
    with pytest.raises(ConfigError, match=r"config\.algo\.kl_coef is not set; grpo has no default for it"):
        make_config(tiny_config(**{"algo.kl_coef": None}))
    assert parsed("--config.algo.name=grpo").algo.kl_coef == 0.05  # naming the one that is there changes nothing


def test_options_of_a_reward_reach_it():
    """3 tokens at 0.5 each."""
    names, option = "rljax.rewards.text:length_cost", "length_cost.per_token"
    with make_runner(parsed(f"--config.reward.names={names}", f"--config.reward.options.{option}=0.5")) as runner:
        assert runner.score([Sample("", "", token_ids=range(3))]).values == [-1.5]


def test_a_stage_with_the_algorithm_of_the_top_level_takes_its_settings():
    config = parsed("--config.stages.warm_start.algo.name=grpo", "--config.stages.warm_start.batch.rows=0")
    assert config.stages["warm_start"].algo == config.algo


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--config.steps=abc"], "config.steps is 'abc'; it takes a whole number"),
        (["--config.steps=2.5"], "config.steps is '2.5'; it takes a whole number"),
        (["--config.steps=-1"], "config.steps is -1; it is 0 or more"),
        (["--config.rollout.top_p=1.5"], "config.rollout.top_p is 1.5; it is in (0, 1]"),
        (["--config.optim.learning_rate=nan"], "config.optim.learning_rate is nan; it takes a number"),
        (["--config.checkpoint.export=yes"], "config.checkpoint.export is 'yes'; it takes True or False"),
        (["--config.profile_steps=1,x"], "config.profile_steps is 'x'; it takes a whole number"),
        (["--config.optim=3"], "config.optim is a group of keys; name one"),
        (["--config.stages=3"], "config.stages is a group of keys; name one"),
        (["--config.steps.foo=3"], "config.steps is a single value, which has no key 'foo'"),
        (["--config.optim.lerning_rate=1"], "config.optim.lerning_rate: no such key; did you mean 'learning_rate'?"),
        (["--config.optim.lr=1"], "config.optim.lr: no such key; did you mean 'learning_rate'?"),
        (["--config.learning_rate=1"], "config.learning_rate: no such key; did you mean 'config.optim.learning_rate'?"),
        (["--config.sed=1"], "config.sed: no such key; did you mean 'seed'?"),
        (["--config.stages.warm_strt.steps=3"], "config.stages.warm_strt: no such key; did you mean 'warm_start'?"),
        (["--config.stages.warm_start.optim.lr=3"], "config.stages.warm_start.optim.lr: no such key"),
        (["--config.algo.klcoef=1"], "config.algo.klcoef: no such key; did you mean 'kl_coef'?"),
        (["--config.algo.name=gpo"], "config.algo.name: there is no algorithm 'gpo'; did you mean 'grpo'?"),
        (
            ["--config.stages.warm_start.algo.name=sfd"],
            "warm_start.algo.name: there is no algorithm 'sfd'",
        ),
        (["--config.algo.aggregation=mean"], "config.algo.aggregation is 'mean'; it is one of token_mean"),
        (["--config.algo.advantage_mean=grup"], "config.algo.advantage_mean is 'grup'; it is one of group, batch"),
        (["--config.model.remat=blok"], "config.model.remat is 'blok'; it is one of none, dots, block"),
        (["--config.compute_dtype=fp32"], "config.compute_dtype is 'fp32'; it is one of float32"),
        (["--config.optim.schedule=cosin"], "config.optim.schedule 'cosin' is not one of constant, linear, cosine"),
        (["--config.optim.warmup_steps=20"], "config.stages.warm_start.optim: 20 warm-up steps do not fit"),
        (["--config.recipe=warm,main"], "config.recipe names the stage 'warm', which is not under config.stages"),
        (["--config.recipe=main,main"], "config.recipe is ('main', 'main'); it names one stage or more, each once"),
        (["--config.init_from=later"], "config.stages.warm_start.init_from is 'later'; it is one of base, previous"),
        (["--config.reference_from=none"], "reference_from is 'none'; it is one of base, start"),
        (
            ["--config.recipe=main", "--config.stages.warm_start.steps=3"],
            "does not run that stage, so nothing",
        ),
        (["--config.recipe=warm_start", "--config.steps=3"], "has its own; set --config.stages.warm_start.steps"),
        (["--config.recipe=warm_start", "--config.algo.kl_coef=3"], "config.algo.kl_coef: every stage"),
        (["--config.rollout.temperature=0"], "config.rollout.temperature is 0; greedy completions"),
        (["--config.rollout.group_size=1"], "set rollout.group_size to 2 or more"),
        (["--config.rollout.max_rounds=3"], "config.rollout.max_rounds does nothing while keep_groups is 'all'"),
        (["--config.reward.names="], "config.reward.names is empty; name a reward"),
        (["--config.algo.kl_in=reward", "--config.rollout.top_p=0.9"], "or set config.algo.kl_of_truncated"),
        (["--config.rollout.prefill_chunk=3"], "config.rollout.prefill_chunk 3 does not divide the 8 of"),
        (["--config.rollout.cache_dtype=int8"], "config.rollout.cache_dtype is int8, so another policy samples"),
        (["--config.algo.surrogate=gspo"], "set aggregation to 'sequence_mean_token_mean'"),
        (["--config.guide_from=warm_start"], "config.guide_from does nothing: no algorithm of the recipe reads it"),
        (["--config.rollout.keep_between=0.5,0.1"], "keep_between is (0.5, 0.1); give two shares"),
        (["--config.rollout.keep_between=0.1,0.9"], "keep_between does nothing unless keep_groups is 'mixed'"),
        (["--config.reward.weights=1,2"], "config.reward: 1 names and 2 weights"),
        (
            ["--config.reward.names=even_share", "--config.reward.options.even_shar.x=1"],
            "even_shar: no reward of reward.names; did you mean 'even_share'?",
        ),
        (
            ["--config.reward.names=a.b:f,c.d:f", "--config.reward.options.f.x=1"],
            "config.reward.options.f: two rewards of reward.names have that name",
        ),
        (["--config.reward.names=gsm8k", "--config.reward.options.gsm8k=1"], "is 1; it is a group of options"),
        (["--config.algo.kl_coef=0", "--config.reference_ema=0.9"], "config.reference_ema does nothing"),
        (["--config.batch.micro_batch_rows=5"], "batch.micro_batch_rows 5 does not divide a minibatch of 16 rows"),
        (
            ["--config.batch.row_length=15"],
            "batch.row_length 15 is shorter than the 32 tokens that a sequence",
        ),
        (["--config.batch.pack=false", "--config.batch.row_length=64"], "row_length is not read"),
        (["--config.batch.minibatches=3"], "config.batch.minibatches 3 does not divide the 16 rows of a step"),
        (["--config.eval.samples=4"], "config.eval.samples is 4 and eval.temperature 0, which makes them all alike"),
        (["--config.eval.greedy=true"], "config.eval.greedy does nothing at eval.temperature 0"),
        (["--config.profile_steps=1,20"], "config.profile_steps (1, 20) go past the 9 steps of the run"),
        (["--config.stages.warm_start.reward.names=gsm8k"], "config.stages.warm_start.reward.names is not read"),
        (["--config.stages.warm_start.data.test_rows=4"], "config.stages.warm_start.data.test_rows is not read"),
        (["--config.tokenizer.system_prompt=Hi"], "config.tokenizer.system_prompt does nothing"),
        (["--config.model.architecture.hiden_size=64"], "no such key; did you mean 'hidden_size'?"),
        (["--config.profile_steps=4,2"], "config.profile_steps takes the first and the last step"),
        (["--config.model.path=x"], "config.model: set exactly one of path (a checkpoint) and architecture"),
        (["--config.tokenizer.path="], "config.tokenizer.path is not set"),
        (
            ["--config.limits.kl_per_completion=8", "--config.algo.kl_coef=0"],
            "config.limits.kl_per_completion is on the KL to a reference, and no stage that samples has one; "
            "set config.algo.kl_coef above 0",
        ),
        *(
            (
                [f"--config.limits.{key}=8", "--config.recipe=warm_start"],
                f"config.limits.{key} is on completions, and no stage of config.recipe samples any",
            )
            for key in ("kl_per_completion", "min_completion_length", "max_completion_length", "perplexity")
        ),
        (
            ["--config.limits.min_completion_length=8", "--config.limits.max_completion_length=4"],
            "config.limits.min_completion_length 8 is above config.limits.max_completion_length 4",
        ),
        (["--configs.steps=3"], "--configs.steps is not a flag; did you mean --config?"),
        (["--steps=3"], "--steps is not a flag; did you mean --config.steps?"),
        (["--learning_rate=3"], "--learning_rate is not a flag; did you mean --config.optim.learning_rate?"),
        (["--optim.learning_rate=3"], "did you mean --config.optim.learning_rate?"),
        (["--frobnicate=3"], "--frobnicate is not a flag; settings are given as --config.key=value"),
        (["--dry-run"], "--dry-run is not a flag; did you mean --dry_run?"),
        (["--dry_run", "--print_config"], "--print_config and --dry_run are two commands; give one of them"),
        (["--dry_run=false"], "--dry_run takes no value"),
        (["-config.steps=3"], "'-config.steps' is not a flag; settings are given as --config.key=value"),
        (["junk"], "'junk' is not a flag; settings are given as --config.key=value"),
        (["--config.mesh"], "--config.mesh has no value"),
        (["--config.mesh", "--dry_run"], "--config.mesh has no value"),
        (["--config", "another.py"], "--config is given twice"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_the_key_and_the_mend(flags, sentence):
    with pytest.raises(ConfigError) as refused:
        parsed(*flags)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def write(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(
        f"from rljax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n{body}"
    )
    return str(path)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("    config.stps = 3\n    return config\n", "line 6: there is no key 'stps'; did you mean 'steps'?"),
        ("    config.optim.lr = 3\n    return config\n", "line 6: there is no key 'lr'; did you mean 'learning_rate'?"),
        ("    config.steps = 2.5\n    return config\n", "line 6: TypeError: Could not override field 'steps'"),
        ("    config.steps = undefined\n", "line 6: NameError: name 'undefined' is not defined"),
        ("    config.steps = = 3\n", "line 6: SyntaxError: invalid syntax"),
        ("    return {}\n", "returns no ConfigDict; start from default_config()"),
        ("    return default_config('gpo')\n", "line 6: config.algo.name: there is no algorithm 'gpo'"),
        ("    return config\n", "config.algo.kl_coef is not set; grpo has no default for it"),
        (
            "    config.stages = {'a': {'optim': {'lr': 1.0}}}\n    config.algo = default_config('sft').algo\n"
            "    config.model.architecture = {'x': 1}\n    return config\n",
            "config.stages.a.optim.lr: no such key; did you mean 'learning_rate'?",
        ),
    ],
)
def test_a_config_file_that_does_not_run_is_named_with_its_line(tmp_path, body, sentence):
    with pytest.raises(ConfigError) as refused:
        parse(["--config", write(tmp_path, body)])
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_config_file_names_its_neighbour():
    with pytest.raises(ConfigError, match=r"there is no config file .*tinny\.py; did you mean .*tiny\.py\?"):
        parse(["--config", TINY.replace("tiny.py", "tinny.py")])
    with pytest.raises(ConfigError, match=r"README\.md is no config file; that is a Python file with get_config"):
        parse(["--config", "README.md"])
    with pytest.raises(ConfigError, match="--config is not set"):
        parse([])


def test_a_file_without_get_config_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.py: it has no function get_config\(\)"):
        parse(["--config", str(tmp_path / "empty.py")])


def test_resolved_and_back_is_the_same_config():
    config = parsed()
    assert make_config(resolved(config)) == config


def test_every_default_is_of_its_own_type():
    """default_config() sets every key to what make_config takes for it, so a file changes only what it names."""
    config = default_config("sft")
    config.tokenizer.path, config.model.architecture = "characters:ab", {"model_type": "llama"}
    assert resolved(make_config(config))["optim"] == config.optim.to_dict()


@pytest.mark.parametrize(
    ("key", "is_fixed"),
    [
        ("seed", True),
        ("model.architecture.hidden_size", True),
        ("model.remat", False),
        ("data.seed", True),
        ("tokenizer.template", True),
        ("algo.kl_coef", True),
        ("rollout.temperature", True),
        ("reward.names", True),
        ("reward.options", True),
        ("reward.workers", False),
        ("batch.minibatches", True),
        ("batch.micro_batch_rows", False),
        ("batch.pack", False),
        ("optim.name", True),
        ("optim.learning_rate", False),
        ("recipe", True),
        ("stages.warm_start.steps", True),  # it is over when the last stage runs
        ("stages.warm_start.data.seed", True),
        ("steps", False),
        ("mesh", False),
        ("eval.every_steps", False),
        ("checkpoint.keep", False),
        ("limits.bad_steps", False),
        ("log.wandb", False),
    ],
)
def test_a_resumed_run_may_change_what_does_not_make_it_another_run(key, is_fixed):
    fixed = identity_keys(parsed())
    assert any(f"{key}.".startswith(f"{name}.") for name in fixed) == is_fixed


def test_every_identity_key_is_a_key():
    """A key that is misspelt or renamed would silently allow a change."""
    values = resolved(parsed())
    for key in identity_keys(parsed()):
        assert at(values, key) is not Ellipsis


def test_choices_are_those_of_the_code():
    assert set(typing.get_args(hints(ModelConfig)["remat"])) == set(REMAT_POLICIES)
    assert set(typing.get_args(policy.AggregationName)) == set(AGGREGATIONS)
    assert set(typing.get_args(grpo.Statistic)) == set(MEANS) == set(SCALES)


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_config_table", ROOT / "docs" / "make_config_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_of_settings_is_current(generator):
    assert (ROOT / "docs" / "config.md").read_text() == generator.page(), "run python docs/make_config_table.py"


def test_a_setting_without_a_meaning_is_refused(generator, monkeypatch):
    monkeypatch.setattr(generator, "meanings", lambda cls: {})
    with pytest.raises(SystemExit, match=r"rljax\.config\.fields\.Config has no comment beside name"):
        generator.page()
