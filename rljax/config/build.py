"""From a ConfigDict or plain dicts to the dataclasses, and back to dicts for printing."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from ml_collections import ConfigDict

from rljax.algos import ALGOS
from rljax.config.checks import check
from rljax.config.errors import ConfigError, nearest
from rljax.config.fields import STAGE_FIELDS, Config, StageConfig

_NOUNS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


def default_config(algo: str = "grpo") -> ConfigDict:
    """Every key with its default: where a config file starts. Its keys are locked: a misspelt one is an error."""
    config = ConfigDict(as_dict(Config()), allow_dotted_keys=False)
    config.algo = algo_defaults(algo)
    config.lock()
    return config


def algo_defaults(name: str, where: str = "config.algo.name") -> ConfigDict:
    """The settings of an algorithm; those its paper must give are None until a config sets them."""
    fields = dataclasses.fields(algorithm_module(name, where).Config)
    values = {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields}
    return ConfigDict({"name": name, **values}, type_safe=False)


def algorithm_module(name: Any, where: str) -> Any:
    if name not in ALGOS:
        raise ConfigError(f"{where}: there is no algorithm {name!r}{nearest(str(name), ALGOS)}")
    return ALGOS[name]


def make_config(raw: ConfigDict | Mapping[str, Any]) -> Config:
    """The dataclasses of a config, checked. Raises ConfigError, one sentence, for what does not fit."""
    given = raw.to_dict() if isinstance(raw, ConfigDict) else dict(raw)
    defaults = as_dict(Config())
    algo = given.get("algo") or {}
    if not isinstance(algo, Mapping) or "name" not in algo:
        raise ConfigError(f"config.algo.name is not set; it is one of {', '.join(ALGOS)}")
    values = _overlaid({**defaults, "algo": algo_defaults(algo["name"]).to_dict()}, given, "config")
    stages = values.pop("stages")
    config = _build(Config, values, "config")
    top = {key: value for key, value in values.items() if key in STAGE_FIELDS}
    built = {}
    for name, overrides in stages.items():
        where = f"config.stages.{name}"
        if name == "main" or not isinstance(overrides, Mapping):
            raise ConfigError(f"{where}: a stage is a group of keys, and 'main' is the top level itself")
        built[name] = _build(StageConfig, _overlaid(top, overrides, where), where)
    config = dataclasses.replace(config, stages=built)
    check(config)
    return config


def resolved(config: Config) -> dict[str, Any]:
    """A config as plain dicts, every stage whole: for printing and for the run folder."""
    values = as_dict(config)
    for where, stage in [(values, config), *((values["stages"][n], s) for n, s in config.stages.items())]:
        name = next(n for n, module in ALGOS.items() if type(stage.algo) is module.Config)
        where["algo"] = {"name": name, **as_dict(stage.algo)}
    return values


def as_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: as_dict(vars(value)[f.name]) for f in dataclasses.fields(value)}
    return {key: as_dict(item) for key, item in value.items()} if isinstance(value, dict) else value


@cache
def hints(cls: type) -> dict[str, Any]:
    """The annotated types of a settings class, in the order of its fields."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {f.name: found[f.name] for f in dataclasses.fields(cls)}


def _overlaid(base: dict, overrides: Mapping, where: str) -> dict:
    """``base`` with ``overrides`` laid over it; a stage with another algorithm starts from that one's defaults."""
    result = dict(base)
    for key, value in overrides.items():
        if key not in base:
            raise no_such_key(where, key, base)
        if (
            key == "algo"
            and isinstance(value, Mapping)
            and value.get("name", base["algo"]["name"]) != base["algo"]["name"]
        ):
            defaults = algo_defaults(value["name"]).to_dict()
            result[key] = _overlaid(defaults, value, f"{where}.algo")
        elif isinstance(value, Mapping) and isinstance(base[key], dict) and key not in _FREE:
            result[key] = _overlaid(base[key], value, f"{where}.{key}")
        else:
            result[key] = value
    return result


# Groups whose keys are the user's own.
_FREE = ("architecture", "columns", "options", "stages")


def _build(cls: type, values: dict, where: str) -> Any:
    known = hints(cls)
    built = {}
    for key, value in values.items():
        if key not in known:
            raise no_such_key(where, key, known)
        built[key] = (
            _build_algo(value, f"{where}.algo") if key == "algo" else convert(known[key], value, f"{where}.{key}")
        )
    try:
        return cls(**built)
    except ConfigError:
        raise
    except ValueError as error:  # a class that checks itself names its own group only
        raise ConfigError(f"{where.rpartition('.')[0]}.{error}") from error


def _build_algo(values: Any, where: str) -> Any:
    if not isinstance(values, dict) or "name" not in values:
        raise ConfigError(f"{where}.name is not set; it is one of {', '.join(ALGOS)}")
    cls = algorithm_module(values["name"], f"{where}.name").Config
    settings = {key: value for key, value in values.items() if key != "name"}
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and settings.get(field.name) is None:
            raise ConfigError(f"{where}.{field.name} is not set; {values['name']} has no default for it")
    return _build(cls, settings, where)


def convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type; ints pass as floats, lists as tuples, nothing else is bent."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Annotated:
        value = convert(args[0], value, where)
        if not args[1].holds(value):
            raise ConfigError(f"{where} is {value!r}; it is {args[1]}")
        return value
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where} is {value!r}; it is one of {', '.join(map(str, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return convert(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(
                f"{where} is {value!r}; it is a group of keys: {', '.join(hints(typing.cast(type, hint)))}"
            )
        return _build(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}; it takes a list, each of them {noun(args[0])}")
        return tuple(convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {value!r}; it is a group of keys")
        return {key: convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)) or value != value:
        raise ConfigError(f"{where} is {value!r}; it takes {noun(hint)}")
    return value


def noun(hint: Any) -> str:
    """What a type is called in a message."""
    args = typing.get_args(hint)
    return noun(args[0]) if typing.get_origin(hint) is typing.Annotated else _NOUNS.get(hint, "another thing")


def no_such_key(where: str, key: str, known: Iterable[str]) -> ConfigError:
    """Names the nearest key of the same group, else the place where a key of that name stands."""
    known = list(known)
    found = [name for name in all_keys(Config, "config") if name.endswith(f".{key}")]
    elsewhere = sorted(found, key=lambda name: name.count("."))
    if elsewhere and not difflib.get_close_matches(key, known, n=1):
        return ConfigError(f"{where}.{key}: no such key; did you mean {elsewhere[0]!r}?")
    return ConfigError(f"{where}.{key}: no such key{nearest(key, known)}")


@cache
def all_keys(cls: type, where: str) -> tuple[str, ...]:
    nested = [(name, hint) for name, hint in hints(cls).items() if dataclasses.is_dataclass(hint)]
    below = [key for name, hint in nested for key in all_keys(typing.cast(type, hint), f"{where}.{name}")]
    return (*(f"{where}.{name}" for name in hints(cls)), *below)
