"""A run's settings as frozen dataclasses, and the way there from a config file and the command line.

The top level of a config describes the main job. A stage that differs from it (a warm start, say) lists under
``stages`` only what differs. ConfigDict stops at the door of ``main``; behind it there are only these classes.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from rljax.algos import ALGOS
from rljax.optim import OptimConfig


class ConfigError(ValueError):
    """A setting that cannot be used; the sentence names the key and the mend."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """``path``: a Hugging Face folder or Hub name. Else ``architecture``: a config.json as a dict, random weights."""

    path: str = ""
    architecture: dict[str, Any] = field(default_factory=dict)
    init_seed: int = 0
    remat: str = "none"  # none | dots | block: what the backward pass keeps of a layer
    logits_chunk: int = 1024  # tokens whose logits exist at once


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    path: str = ""  # default: the model's folder; "characters:<alphabet>" builds one on the spot
    template: str = ""  # "chat", a named plain template, a text with {prompt}, a .jinja file; default: text as it is
    system_prompt: str = ""
    end_tokens: tuple[str, ...] = ()  # default: the checkpoint's


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Rows for training, for choosing a checkpoint (``dev``) and for the final word (``test``).

    A source is a file, a folder with files named after their split, a Hub name, or a generated task. Without a ``dev``
    source, the last ``dev_rows`` of the training rows are held out.
    """

    train: str = ""
    dev: str = ""
    test: str = ""
    train_rows: int = 0  # 0: all there are
    dev_rows: int = 0
    test_rows: int = 0
    columns: dict[str, str] = field(
        default_factory=dict
    )  # our name to the source's: prompt, answer, solution, messages
    options: dict[str, Any] = field(default_factory=dict)  # of a generated task or a Hub data set
    prompt_lengths: tuple[int, ...] = (256,)  # prompts are left-padded to the smallest that fits
    row_length: int = 512  # supervised rows: prompt and completion together
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    prompts_per_step: int = 8
    group_size: int = 8
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    keep_groups: str = "all"  # all | mixed: refill until prompts_per_step groups have both right and wrong answers
    max_rounds: int = 1


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # default: 1 each
    timeout_s: float = 10.0
    workers: int = 4
    processes: bool = False
    failed_value: float = 0.0  # what a sample gets whose reward raised or hung
    permute: bool = False  # a control: rewards shuffled over the batch; nothing may be learnt


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """One rollout (or one draw of rows) is ``epochs`` x ``minibatches`` optimizer steps."""

    rows: int = 0  # supervised and preference stages; rollouts have prompts_per_step x group_size
    epochs: int = 1
    minibatches: int = 1
    micro_batch_rows: int = 0  # rows a forward and backward pass; 0: the whole minibatch


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every_steps: int = 0  # 0: before the first and after the last step only
    samples: int = 1  # completions a prompt; above 1 pass@k is reported too
    temperature: float = 0.0
    prompts_per_batch: int = 64
    shown_prompts: int = 4  # how many fixed prompts go to samples.jsonl


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 0  # 0: after the last step only
    keep: int = 2
    keep_best: bool = True  # by the dev score, beside the newest
    export: bool = True  # the trained policy as a Hugging Face folder


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """When to stop a run that has gone wrong; the reason is logged. 0 switches a rule off."""

    bad_steps: int = 10  # steps skipped in a row because loss or gradient was not finite
    kl_per_completion: float = 0.0
    min_completion_length: float = 0.0
    max_completion_length: float = 0.0
    perplexity: float = 0.0  # of the completions under the policy


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    tensorboard: bool = False
    wandb: bool = False
    samples_per_step: int = 0  # best, worst and random completions of a step written to samples.jsonl
    peak_tflops: float = 0.0  # a chip's, for MFU; 0: from the table of known devices


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What one stage of a recipe trains on and how. Fields stand at the top level of a config for the main stage."""

    algo: Any = None  # the algorithm's own Config
    steps: int = 1  # rollouts, or draws of supervised rows
    init_from: str = "previous"  # base | previous | a stage's name
    reference_from: str = "start"  # start (of this stage) | base | a stage's name | none
    reference_reset_steps: int = 0  # copy the policy into the reference every so many steps
    reference_ema: float = 0.0  # decay of a reference that follows the policy; 0: it stays
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-6))


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """A whole run."""

    name: str = "run"
    output_dir: str = ""
    seed: int = 0
    recipe: tuple[str, ...] = ("main",)  # stage names in order; "main" is the top level itself
    stages: dict[str, StageConfig] = field(default_factory=dict)
    mesh: str = "1,-1,1"  # replica, fsdp, tensor
    decode_mesh: str = ""  # default: the training mesh
    distributed: str = ""  # host:port,count,index; empty: automatic on TPU and Slurm, else a single process
    cpu_devices: int = 1  # simulated devices where there is no accelerator
    compute_dtype: str = "float32"
    compilation_cache: str = ""  # a folder; default: ~/.cache/rljax; "off"
    profile_steps: tuple[int, ...] = ()  # first and last step of a trace
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = TokenizerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    limits: LimitConfig = LimitConfig()
    log: LogConfig = LogConfig()

    def stage(self, name: str) -> StageConfig:
        return self if name == "main" else self.stages[name]


# Changing these on a run that has begun would make it another run.
IDENTITY_KEYS = ("seed", "model", "tokenizer", "data", "recipe", "stages", "rollout", "batch", "algo")

_STAGE_FIELDS = tuple(f.name for f in dataclasses.fields(StageConfig))


def default_config(algo: str = "grpo") -> ConfigDict:
    """Every key with its default: where a config file starts. Its keys are locked: a misspelt one is an error."""
    config = ConfigDict(_to_dict(Config(algo=None)), allow_dotted_keys=False)
    config.algo = algo_defaults(algo)
    config.lock()
    return config


def algo_defaults(name: str) -> ConfigDict:
    """The settings of an algorithm; those its paper must give are None until a config sets them."""
    if name not in ALGOS:
        raise ConfigError(f"config.algo.name: no algorithm {name!r}{_nearest(name, ALGOS)}")
    fields = dataclasses.fields(ALGOS[name].Config)
    values = {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields}
    return ConfigDict({"name": name, **values}, type_safe=False)


def make_config(raw: ConfigDict) -> Config:
    """The dataclasses of a ConfigDict. Raises ConfigError, one sentence, for a key or a value that does not fit."""
    values = raw.to_dict()
    stages = values.pop("stages") or {}
    top = {k: v for k, v in values.items() if k in _STAGE_FIELDS}
    _refuse_shadowed(top, stages, values["recipe"])
    built = {
        name: _build(StageConfig, _overlaid(top, overrides, f"config.stages.{name}"), f"config.stages.{name}")
        for name, overrides in stages.items()
    }
    config = dataclasses.replace(_build(Config, values, "config"), stages=built)
    _check(config)
    return config


def _overlaid(base: dict, overrides: dict, where: str) -> dict:
    """``base`` with ``overrides`` laid over it; a stage with another algorithm starts from that one's defaults."""
    result = dict(base)
    for key, value in overrides.items():
        if key not in base:
            raise ConfigError(f"{where}.{key}: no such key{_nearest(key, base)}")
        if key == "algo" and value.get("name", base["algo"]["name"]) != base["algo"]["name"]:
            result[key] = _overlaid(algo_defaults(value["name"]).to_dict(), value, f"{where}.algo")
        elif isinstance(value, dict) and isinstance(base[key], dict):
            result[key] = _overlaid(base[key], value, f"{where}.{key}")
        else:
            result[key] = value
    return result


def _refuse_shadowed(top: dict, stages: dict, recipe: tuple[str, ...]) -> None:
    if "main" not in recipe and recipe:
        unread = [k for k in top if all(k in stages.get(name, {}) for name in recipe)]
        if unread:
            raise ConfigError(f"config.{unread[0]}: every stage of the recipe replaces it; set it in the stages")


def _build(cls: type, values: dict, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{where}.{key}: no such key{_nearest(key, known)}")
        built[key] = _convert(hints[key], value, f"{where}.{key}") if key != "algo" else _build_algo(value, where)
    missing = [n for n, f in known.items() if n not in built and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{where}.{missing[0]} is not set; this method has no default for it")
    return cls(**built)


def _build_algo(values: dict | None, where: str) -> Any:
    if not values or "name" not in values:
        raise ConfigError(f"{where}.algo.name is not set; it is one of {', '.join(ALGOS)}")
    if values["name"] not in ALGOS:
        raise ConfigError(f"{where}.algo.name: no algorithm {values['name']!r}{_nearest(values['name'], ALGOS)}")
    settings = {k: v for k, v in values.items() if k != "name"}
    cls = ALGOS[values["name"]].Config
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    settings = {k: v for k, v in settings.items() if not (k in required and v is None)}
    return _build(cls, settings, f"{where}.algo")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type; ints pass as floats, lists as tuples, nothing else is bent."""
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}; it is a group of keys")
        return _build(typing.cast(type, hint), value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}; it takes a list, such as ({', '.join(['...'] * 2)})")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict or hint is dict:
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} is {value!r}; it takes {_ARTICLE[hint]}")
    return value


_ARTICLE = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(known))}"


def _to_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _to_dict(vars(value)[f.name]) for f in dataclasses.fields(value)}
    return {key: _to_dict(item) for key, item in value.items()} if isinstance(value, dict) else value


def resolved(config: Config) -> dict[str, Any]:
    """A config as plain dicts, for printing and for the run folder."""
    values = _to_dict(config)
    for where, stage in [(values, config), *((values["stages"][n], s) for n, s in config.stages.items())]:
        name = next(n for n, module in ALGOS.items() if isinstance(stage.algo, module.Config))
        where["algo"] = {"name": name, **_to_dict(stage.algo)}
    return values


def _check(config: Config) -> None:
    """Combinations that cannot work, before anything is loaded."""
    for name in config.recipe:
        if name != "main" and name not in config.stages:
            raise ConfigError(
                f"config.recipe names {name!r}, which is not under config.stages{_nearest(name, config.stages)}"
            )
    if bool(config.model.path) == bool(config.model.architecture):
        raise ConfigError("config.model: set exactly one of path (a checkpoint) and architecture (random weights)")
    if config.compute_dtype not in ("float32", "bfloat16", "float64"):
        raise ConfigError(f"config.compute_dtype is {config.compute_dtype!r}; it is float32, bfloat16 or float64")
    if len(config.profile_steps) not in (0, 2):
        raise ConfigError("config.profile_steps takes the first and the last step of the trace, such as 10,12")
    for name in config.recipe:
        _check_stage(config.stage(name), "config" if name == "main" else f"config.stages.{name}")


def _check_stage(stage: StageConfig, where: str) -> None:
    r, b = stage.rollout, stage.batch
    if stage.steps < 0:
        raise ConfigError(f"{where}.steps is {stage.steps}; it is 0 or more")
    if r.temperature < 0 or not 0 < r.top_p <= 1 or r.top_k < 0 or not 0 <= r.min_p < 1:
        raise ConfigError(f"{where}.rollout: temperature and top_k are 0 or more, top_p in (0, 1], min_p in [0, 1)")
    if r.keep_groups not in ("all", "mixed"):
        raise ConfigError(f"{where}.rollout.keep_groups is {r.keep_groups!r}; it is all or mixed")
    if stage.reward.weights and len(stage.reward.weights) != len(stage.reward.names):
        raise ConfigError(f"{where}.reward: {len(stage.reward.names)} names and {len(stage.reward.weights)} weights")
    rows = b.rows or r.prompts_per_step * r.group_size
    if rows % b.minibatches:
        raise ConfigError(f"{where}.batch.minibatches {b.minibatches} does not divide the {rows} rows of a step")
    if b.micro_batch_rows and (rows // b.minibatches) % b.micro_batch_rows:
        raise ConfigError(
            f"{where}.batch.micro_batch_rows {b.micro_batch_rows} does not divide "
            f"a minibatch of {rows // b.minibatches} rows"
        )
