"""Truth 8: every config field is read. That a model's constants are is in tests/models/test_config.py."""

import ast
import dataclasses
import sys
import typing
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rljax.algos import ALGOS
from rljax.config import Config
from rljax.config.fields import CriticConfig
from tests.conftest import ROOT

pytestmark = pytest.mark.fast


@cache
def walk(node: ast.AST) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(node))


PARSED = {file.relative_to(ROOT): ast.parse(file.read_text()) for file in sorted((ROOT / "rljax").rglob("*.py"))}
# Where fields are declared, checked and printed, which is no use of them, but in the properties of their classes.
DECLARED = ast.parse(
    "\n".join(
        ast.unparse(node) for node in walk(PARSED[Path("rljax/config/fields.py")]) if isinstance(node, ast.ClassDef)
    )
)
USING = [tree for file, tree in PARSED.items() if "config" not in file.parts and file.name != "shrink.py"] + [DECLARED]
FUNCTIONS = [node for tree in USING for node in walk(tree) if isinstance(node, ast.FunctionDef)]


def last_name(node: ast.AST) -> str:
    """x of ``x``, ``a.b.x`` and ``a.x(1)``."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def names_of(tree: ast.AST, classes: set[str], group: str) -> set[str]:
    """What an object of the classes is called: as its group, as what is assigned from that, as an argument.

    Beside their declaration stand tables of functions of ``c``.
    """
    names = {group}
    for node in walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in classes:
            names.add("c")
        if isinstance(node, ast.arg) and node.annotation is not None:
            names |= {node.arg} if last_name(node.annotation) in classes else set()
        if isinstance(node, ast.Assign):
            to, what = node.targets[0], node.value
            pairs = [(to, what)]
            if isinstance(to, ast.Tuple) and isinstance(what, ast.Tuple):
                pairs = list(zip(to.elts, what.elts, strict=True))
            names |= {last_name(a) for a, b in pairs if isinstance(b, ast.Attribute) and b.attr == group}
    return names - {""}


def reads(tree: ast.AST, classes: set[str], group: str) -> set[str]:
    """Fields that are read of objects of the classes: as attributes, and by name where ``vars`` is asked for them.

    The names stand in the function that asks, or in a table that it reads."""
    names, found = names_of(tree, classes, group), set()
    for node in walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in classes:
            found |= attributes(node, {"self"})
        if isinstance(node, ast.FunctionDef) and any(is_vars(part, names) for part in walk(node)):
            tables = {part.id for part in walk(node) if isinstance(part, ast.Name)}
            places = [node, *(a for a in walk(tree) if isinstance(a, ast.Assign) and last_name(a.targets[0]) in tables)]
            found |= {part.value for place in places for part in walk(place) if isinstance(part, ast.Constant)}
            found |= {name for part in walk(node) for name in taken_by_name(part)}
    return found | attributes(tree, names)


def attributes(tree: ast.AST, names: set[str]) -> set[str]:
    loaded = (n for n in walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))
    return {node.attr for node in loaded if last_name(node.value) in names}


def is_vars(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and last_name(node.func) == "vars" and last_name(node.args[0]) in names


def taken_by_name(call: ast.AST) -> Iterable[str]:
    """The arguments of what is called with ``**``."""
    if isinstance(call, ast.Call) and any(keyword.arg is None for keyword in call.keywords):
        for function in FUNCTIONS:
            if function.name == last_name(call.func):
                yield from (arg.arg for arg in (*function.args.args, *function.args.kwonlyargs))


def fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


# By class, the name that it is read under: ``stage.rollout.top_k``, ``config.critic.optim``.
HINTS = typing.get_type_hints(Config) | typing.get_type_hints(CriticConfig)
GROUPS = {kind: name for name, kind in HINTS.items() if dataclasses.is_dataclass(kind)}


@pytest.mark.parametrize("kind", GROUPS, ids=lambda kind: kind.__name__)
def test_every_field_of_a_group_is_read(kind: Any) -> None:
    group = GROUPS[kind]
    found = set().union(*(reads(tree, {kind.__name__}, group) for tree in USING))
    assert fields(kind) - found == set()


def test_every_field_of_a_run_and_of_a_stage_is_read() -> None:
    """A stage's settings and a run's go by the names of stage and config; so do those of algorithms, elsewhere."""
    above = [tree for file, tree in PARSED.items() if file.parts[1] not in ("algos", "models", "losses", "optim.py")]
    trees = [tree for tree in above if tree in USING] + [DECLARED]
    classes = {"Config", "StageConfig"}
    found = set().union(*(reads(tree, classes, name) for tree in trees for name in ("config", "stage", "place")))
    assert fields(Config) - found == set()


def with_imports(module: ModuleType) -> set[ModuleType]:
    """An algorithm's module and those of rljax.algos that it is made of."""
    found, waiting = set[ModuleType](), [module]
    while waiting:
        module = waiting.pop()
        found.add(module)
        places = (node for node in walk(PARSED[file_of(module)]) if isinstance(node, ast.ImportFrom))
        for node in places:
            inside = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            parts = {sys.modules[name] for name in inside if name.startswith("rljax.algos.") and name in sys.modules}
            waiting += parts - found
    return found


def file_of(module: ModuleType) -> Path:
    return Path(*module.__name__.split(".")).with_suffix(".py")


@pytest.mark.parametrize("name", ALGOS)
def test_every_setting_of_an_algorithm_is_read(name: str) -> None:
    kind = ALGOS[name].Config
    classes = {parent.__name__ for parent in kind.__mro__}
    found = set().union(*(reads(PARSED[file_of(m)], classes, "config") for m in with_imports(ALGOS[name])))
    checks = walk(PARSED[Path("rljax/config/checks.py")])  # one of them only allows what is refused without it
    found |= {
        node.slice.value
        for node in checks
        if isinstance(node, ast.Subscript) and last_name(node.value) == "algo" and isinstance(node.slice, ast.Constant)
    }
    assert fields(kind) - found == set()


def test_a_field_that_nobody_reads_is_found() -> None:
    tree = ast.parse(
        "def f(rollout, r):\n    s = stage.rollout\n    rollout.a = 1\n    return s.b + r.c + vars(rollout)['d']"
    )
    assert reads(tree, {"RolloutConfig"}, "rollout") & set("abcd") == {"b", "d"}
