"""Finds rewards by name: in a registry, or as ``package.module:function``."""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def look_up(name: str, registry: Mapping[str, Any], kind: str) -> Any:
    """The entry of that name. Raises ValueError with the nearest name if there is none."""
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=1, cutoff=0.0)
        raise ValueError(f"there is no {kind} {name!r}; {f'the nearest is {near[0]!r}' if near else 'it has none'}")
    return registry[name]


def import_object(path: str, kind: str) -> Any:
    """What ``package.module:function`` names. Raises ValueError, also when the module itself does not import."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module does while it is imported
        raise ValueError(f"{kind} {path!r}: cannot import {module_name!r} ({type(error).__name__}: {error})") from error
    public = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    if attribute in vars(module):
        if not callable(vars(module)[attribute]):
            raise ValueError(f"{kind} {path!r} is {vars(module)[attribute]!r}; name a function or a class")
        return vars(module)[attribute]
    return look_up(attribute, public, f"{kind} in {module_name}")


def with_options(reward: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """The reward with keyword options bound; a class is made into an instance. Raises ValueError for an unknown one."""
    parameters = dict(inspect.signature(reward).parameters)
    if not inspect.isclass(reward):  # what a call brings along is no option
        parameters = {name: p for name, p in parameters.items() if name not in ("prompt", "completion", "sample")}
    if not any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        for option in options:
            look_up(option, parameters, f"option of {reward.__name__}")
    if inspect.isclass(reward):
        return reward(**options)
    return functools.partial(reward, **options) if options else reward
