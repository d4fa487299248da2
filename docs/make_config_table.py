"""Writes docs/config.md, one row for each setting: ``python docs/make_config_table.py``.

Types and defaults are those of the dataclasses; what a field means is the comment beside it, or what the docstring of
its class says of it. A field without a meaning is an error.
"""

import ast
import dataclasses
import inspect
import io
import tokenize
import typing
from pathlib import Path
from typing import Any

from rljax.algos import ALGOS
from rljax.config.build import hints, noun
from rljax.config.fields import Config, Range, StageConfig

ROOT = Path(__file__).resolve().parent.parent

INTRODUCTION = """# Settings

Every key of a config. This page is generated from the dataclasses by `docs/make_config_table.py`, and a test keeps it
up to date. Set keys as attributes in a config file (`config.optim.learning_rate = 1e-6`) or as flags on the command
line (`--config.optim.learning_rate=1e-6`; lists are written `10,12`). `--print_config` prints the result.

Keys of a stage apply to the main stage at the top level. Other stages override them under `config.stages.<name>`.
"not set" means that there is no default and a config has to give the value.
"""


def page() -> str:
    stage_keys = set(hints(StageConfig))
    groups = {name: hint for name, hint in hints(Config).items() if dataclasses.is_dataclass(hint)}
    parts = [
        INTRODUCTION,
        section("A run: `config`", Config, [name for name in hints(Config) if name not in stage_keys | set(groups)]),
        section("A stage: `config`", StageConfig, [n for n in hints(StageConfig) if n not in groups]),
    ]
    parts += [section(f"`config.{name}`", cls, list(hints(cls))) for name, cls in groups.items()]
    parts += [
        section(f"`config.algo` with `name = {name!r}`", module.Config, list(hints(module.Config)), module)
        for name, module in ALGOS.items()
    ]
    return "\n".join(parts)


def section(title: str, cls: type, names: list[str], module: Any = None) -> str:
    told = meanings(cls)
    missing = ", ".join(name for name in names if not told.get(name))
    if missing:
        where = f"{cls.__module__}.{cls.__name__}"
        raise SystemExit(f"docs/config.md cannot be written: {where} has no comment beside {missing}.")
    rows = [f"| `{name}` | {kind(hints(cls)[name])} | {default(cls, name)} | {cell(told[name])} |" for name in names]
    about = first_line(module) if module else first_line(cls) if title.startswith("`") else ""
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows] if rows else ["No settings."]
    return "\n".join([f"## {title}", "", *([about, ""] if about else []), *table, ""])


def first_line(documented: Any) -> str:
    text = inspect.getdoc(documented) or ""
    generated = text.startswith(f"{documented.__name__}(")  # by dataclass, where a class has none of its own
    return "" if generated else text.split("\n\n")[0].replace("``", "`")


def meanings(cls: type) -> dict[str, str]:
    """Field to the comment beside it, over the classes that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        source = inspect.getsource(base)
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found


def kind(hint: Any) -> str:
    """A type in words: int, 1 or more."""
    args = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Annotated:
            return f"{kind(args[0])}, {next(a for a in args if isinstance(a, Range))}"
        case typing.Literal:
            return ", ".join(f"`{choice}`" for choice in args)
        case _ if hint is Any:
            return "group"
    if typing.get_origin(hint) is tuple:
        return f"list of {kind(args[0])}"
    if typing.get_origin(hint) is dict:
        return "group"
    if dataclasses.is_dataclass(hint):
        return "group, as `config.optim`"
    if args:
        return " or ".join("None" if arg is type(None) else kind(arg) for arg in args)
    assert noun(hint) != "another thing", hint
    return hint.__name__


def default(cls: type, name: str) -> str:
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    value = field.default if field.default is not dataclasses.MISSING else None
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        standing = vars(Config())
        group = next((v for v in standing.values() if isinstance(v, cls)), None)
        return f"`{vars(group)[name]!r}`" if group is not None else "not set"
    if name == "algo":
        return "see below, by name"
    if dataclasses.is_dataclass(value):
        return ", ".join(f"`{key} = {item!r}`" for key, item in vars(value).items() if differs(value, key))
    return f"`{value!r}`"


def differs(group: Any, key: str) -> bool:
    """Whether a nested group's default is its own, not its class's."""
    standing = next(f for f in dataclasses.fields(group) if f.name == key).default
    return vars(group)[key] != standing


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(page())
