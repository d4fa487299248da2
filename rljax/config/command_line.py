"""The command line: ``--config FILE``, ``--config.dotted.key=value`` and two switches, and nothing else."""

import ast
import dataclasses
import difflib
import importlib.util
import re
import traceback
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rljax.algos import ALGOS
from rljax.config.build import algo_defaults, all_keys, hints, make_config, no_such_key, noun
from rljax.config.errors import ConfigError, nearest
from rljax.config.fields import STAGE_FIELDS, Config, StageConfig

USAGE = """usage: python -m rljax.main --config FILE [--config.KEY=VALUE ...] [--print_config | --dry_run]

  --config FILE         a Python file with get_config(), such as configs/quickstart.py, or one of its VARIANTS,
                        such as configs/zephyr.py:paper
  --config.KEY=VALUE    override a setting: --config.optim.learning_rate=1e-6 --config.mesh=1,-1,4
                        (docs/config.md lists them all; lists are written 10,12)
  --print_config        print the resolved config and exit
  --dry_run             check everything, print the first prompts and the memory plan, and exit; compiles nothing
"""
SWITCHES = ("print_config", "dry_run")
KEYS = sorted({key.rpartition(".")[2] for key in all_keys(Config, "config")})


class Command(NamedTuple):
    config: Config
    print_config: bool
    dry_run: bool


def parse(arguments: Sequence[str]) -> Command:
    """What a command line (without the program's name) asks for. Raises ConfigError, one sentence."""
    file, overrides, switches = _split(arguments)
    if len(switches) > 1:
        raise ConfigError("--print_config and --dry_run are two commands; give one of them")
    if not file:
        raise ConfigError("--config is not set; name a file such as configs/quickstart.py")
    values = load_config_file(file)
    algo_defaults(values["algo"]["name"])  # an unknown name is said before its keys are
    # The algorithm first: its other keys depend on it.
    for key, text in sorted(overrides.items(), key=lambda item: not item[0].endswith("algo.name")):
        _override(values, key, text)
    _refuse_unread(values, overrides)
    return Command(make_config(values), *(name in switches for name in SWITCHES))


def _split(arguments: Sequence[str]) -> tuple[str, dict[str, str], set[str]]:
    """The config file, the overrides by dotted key, the switches. ``--flag value`` is the same as ``--flag=value``."""
    file, overrides, switches = "", {}, set()
    waiting = list(arguments)
    while waiting:
        flag, equals, text = waiting.pop(0).partition("=")
        name = flag.removeprefix("--")
        if name == flag:
            raise ConfigError(f"{flag!r} is not a flag; settings are given as --config.key=value")
        if name in SWITCHES:
            if equals:
                raise ConfigError(f"{flag} takes no value")
            switches.add(name)
            continue
        if name != "config" and not name.startswith("config."):
            raise ConfigError(f"{flag} is not a flag; {_meant(name)}")
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise ConfigError(f"{flag} has no value; write {flag}=value")
            text = waiting.pop(0)
        if name == "config":
            if file:
                raise ConfigError(f"--config is given twice, as {file} and as {text}")
            file = text
        else:
            overrides[name.removeprefix("config.")] = text
    return file, overrides, switches


def _meant(name: str) -> str:
    """What a flag may have been meant to be: a setting without its group, or a misspelt flag."""
    keys = [key for key in all_keys(Config, "config") if key.endswith(f".{name}")]
    close = difflib.get_close_matches(name.partition(".")[0], ("config", *SWITCHES), n=1)
    found = sorted(keys, key=lambda key: key.count("."))[:1] or close
    return f"did you mean --{found[0]}?" if found else "settings are given as --config.key=value"


def load_config_file(path: str) -> dict[str, Any]:
    """What ``get_config()`` of a file returns, as plain dicts. Raises ConfigError where it does not run.

    ``file.py:name`` is the entry of that name in the file's ``VARIANTS``.
    """
    path, _, variant = path.partition(".py:")
    path = f"{path}.py" if variant else path
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        others = [str(other) for folder in (file.parent, Path("configs")) for other in folder.glob("*.py")]
        close = difflib.get_close_matches(path, others, n=1) or [o for o in others if Path(o).stem == path]
        hint = f"; did you mean {close[0]}?" if close else "; that is a Python file with get_config()"
        what = f"{path} is no config file" if file.exists() else f"there is no config file {path}"
        raise ConfigError(f"--config: {what}{hint}")
    spec = importlib.util.spec_from_file_location("rljax_config_file", file)
    assert spec is not None and spec.loader is not None  # it is a .py file
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = _variant(path, vars(module), variant)() if variant else vars(module)["get_config"]()
    except Exception as error:  # whatever a user's file does
        raise ConfigError(f"--config: {_place(path, error)}: {_reason(error)}") from error
    if not isinstance(made, ConfigDict) or set(made) < set(hints(Config)):
        raise ConfigError(f"--config: get_config() of {path} returns no ConfigDict; start from default_config()")
    return made.to_dict()


def _variant(path: str, module: dict[str, Any], name: str) -> Any:
    variants = module.get("VARIANTS", {})
    if name not in variants:
        raise ConfigError(f"it has no variant {name!r}; it has {', '.join(variants) or 'none: leave it out'}")
    return variants[name]


def _place(path: str, error: Exception) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    return f"{path}, line {line}" if line else path


def _reason(error: Exception) -> str:
    """One line of an exception; ConfigDict's own about a key is a page."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, KeyError) and error.args == ("get_config",):
        return "it has no function get_config()"
    unknown = re.search(r'Key "(\w+)" does not exist', str(error))
    if unknown:
        return f"there is no key {unknown[1]!r}{nearest(unknown[1], KEYS, 'docs/config.md lists them')}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _override(values: dict[str, Any], dotted: str, text: str) -> None:
    """Set one key from its text, by the type that the key has."""
    keys, where, group, hint = dotted.split("."), "config", values, typing.cast(Any, Config)
    for depth, key in enumerate(keys):
        hint = _child(hint, group, key, values["algo"]["name"], where)
        where = f"{where}.{key}"
        if depth < len(keys) - 1:
            group = group.setdefault(key, {})
    if where.endswith(".algo.name"):
        if text != group.get("name", values["algo"]["name"]):
            # Another algorithm starts from its own defaults; a stage takes those when it is built.
            fresh = algo_defaults(text, where).to_dict()
            group.clear()
            group.update(fresh if where == "config.algo.name" else {"name": text})
        return
    group[keys[-1]] = parse_text(hint, text, where)


def _child(hint: Any, group: Any, key: str, algo_name: str, where: str) -> Any:
    """The type of ``key`` in a group of type ``hint``. Raises ConfigError where there is no such key."""
    known: dict[str, Any] = {}
    if typing.get_origin(hint) is dict:
        item = typing.get_args(hint)[1]
        if item is not StageConfig:  # the keys are the user's own
            close = difflib.get_close_matches(key, group, n=1, cutoff=0.8)
            if close and key not in group:
                raise ConfigError(f"{where}.{key}: no such key; did you mean {close[0]!r}?")
            return item
        known = dict.fromkeys(group, item)
    elif hint is Any and isinstance(group, dict):
        return Any
    elif dataclasses.is_dataclass(hint):
        known = dict(hints(typing.cast(type, hint)))
        if "algo" in known:
            known["algo"] = ALGOS[(group.get("algo") or {}).get("name", algo_name)].Config
        if where.endswith(".algo"):
            known["name"] = str
    else:
        raise ConfigError(f"{where} is a single value, which has no key {key!r}; write --{where}=value")
    if key not in known:
        raise no_such_key(where, key, known)
    return known[key]


def parse_text(hint: Any, text: str, where: str) -> Any:
    """A value as it stands on the command line; its range is checked when the config is built."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return parse_text(args[0], text, where)
    if origin in (typing.Union, types.UnionType):
        inner = next(a for a in args if a is not type(None))
        return None if text.lower() == "none" else parse_text(inner, text, where)
    if dataclasses.is_dataclass(hint):
        below = next(iter(hints(typing.cast(type, hint))))
        raise ConfigError(f"{where} is a group of keys; name one, such as --{where}.{below}=value")
    if origin is tuple:
        items = _literal(text) if text[:1] in ("(", "[") else [part.strip() for part in text.split(",") if part.strip()]
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{where} is {text!r}; it takes a list such as 1,2")
        return tuple(parse_text(args[0], str(item), where) for item in items)
    if hint is Any or origin is dict:
        value = _literal(text)
        if origin is dict and not isinstance(value, dict):
            raise ConfigError(f"{where} is a group of keys; name one, such as --{where}.key=value")
        return value
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            pass
    if hint in (bool, int, float):
        raise ConfigError(f"{where} is {text!r}; it takes {noun(hint)}")
    return text


def _literal(text: str) -> Any:
    """A Python literal, else the text itself."""
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (SyntaxError, ValueError):
        return text


def _refuse_unread(values: dict[str, Any], overrides: Iterable[str]) -> None:
    """Overrides that no stage of the recipe would read: a run must not ignore what it was told."""
    recipe, stages = tuple(values["recipe"]), values["stages"]
    for dotted in overrides:
        keys = dotted.split(".")
        if keys[0] == "stages" and keys[1] not in recipe:
            raise ConfigError(f"config.{dotted}: config.recipe {recipe} does not run that stage, so nothing reads it")
        if keys[0] in STAGE_FIELDS and recipe and all(_replaces(stages, name, keys, values) for name in recipe):
            raise ConfigError(
                f"config.{dotted}: every stage of config.recipe {recipe} has its own; "
                f"set --config.stages.{recipe[-1]}.{dotted}"
            )


def _replaces(stages: dict[str, Any], name: str, keys: list[str], values: dict[str, Any]) -> bool:
    """Whether a stage does not read the top level's value at ``keys``."""
    if name == "main" or name not in stages:
        return False
    if keys[0] == "algo" and stages[name].get("algo", {}).get("name", values["algo"]["name"]) != values["algo"]["name"]:
        return True
    place: Any = stages[name]
    for key in keys:
        if not isinstance(place, dict) or key not in place:
            return False
        place = place[key]
    return True
