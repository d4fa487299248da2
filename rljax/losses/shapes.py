"""What a signature says of its arrays' shapes, held against those of a call: one sentence by name, nothing computed."""

import inspect
import typing
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

from jaxtyping import AbstractArray

P = ParamSpec("P")
R = TypeVar("R")


class Given(NamedTuple):
    """An array of a call: its name, its dimensions as the signature has them, its shape."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]


def check_shapes(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with its jaxtyping annotations kept: a dimension has one size in a call.

    ``*s`` stands for any number of axes, ``#`` lets a size of 1 broadcast; fields of a NamedTuple count as arguments.
    Numbers, arrays without axes and None fit everywhere. Raises ValueError with the names and shapes of the two
    arguments that part ways. Shapes are known while tracing: a compiled call pays nothing.
    """
    signature = inspect.signature(function)
    annotations = {name: parameter.annotation for name, parameter in signature.parameters.items()}

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # Python says what is missing
        refuse_unequal(function.__name__, [g for name, x in arguments.items() for g in _given(name, x, annotations)])
        return function(*args, **kwargs)

    return checked


def refuse_unequal(function_name: str, arrays: list[Given]) -> None:
    """Raises ValueError at the first array that has another size, or number of axes, than its dimensions had before."""
    seen: dict[str, tuple[int, bool, Given]] = {}
    for array in arrays:
        if not _has_axes_for(array):
            like = next((x for x in arrays if x.dims == array.dims and _has_axes_for(x)), None)
            raise ValueError(f"{function_name}: {_both(like, array) if like else _one(array)}")
        for name, size, broadcasts in _sizes(array):
            before, did_broadcast, other = seen.setdefault(name, (size, broadcasts, array))
            if did_broadcast and before == 1:
                seen[name] = (size, broadcasts, array)
            elif size != before and not (broadcasts and size == 1):
                raise ValueError(f"{function_name}: {_one(array) if other is array else _both(other, array)}")


def _given(name: str, value: Any, annotations: dict[str, Any]) -> Iterator[Given]:
    """The arrays with axes of one argument: itself, the fields of a NamedTuple, or each of ``*arrays``."""
    if hasattr(value, "_fields"):
        fields = {f"{name}.{field}": annotation for field, annotation in type(value).__annotations__.items()}
        for field, x in zip(fields, value, strict=True):
            yield from _given(field, x, fields)
    elif isinstance(value, tuple):
        for place, x in enumerate(value):
            yield from _given(f"{name}[{place}]", x, {f"{name}[{place}]": annotations[name]})
    elif (dims := _dims(annotations[name])) is not None and (shape := getattr(value, "shape", ())):
        yield Given(name, dims, tuple(shape))


def _dims(annotation: Any) -> tuple[str, ...] | None:
    """``Float[Array, "b t"] | None`` -> ("b", "t"); None where there is no array or its shape may be one of several."""
    members = typing.get_args(annotation) or (annotation,)
    found = {x.dim_str for x in members if isinstance(x, type) and issubclass(x, AbstractArray)}
    return tuple(found.pop().split()) if len(found) == 1 else None


def _has_axes_for(array: Given) -> bool:
    fixed = [dim for dim in array.dims if not _is_variadic(dim)]
    return len(array.shape) == len(fixed) or (len(fixed) < len(array.dims) and len(array.shape) > len(fixed))


def _is_variadic(dim: str) -> bool:
    return dim == "..." or "*" in dim


def _sizes(array: Given) -> Iterator[tuple[str, int, bool]]:
    """(dimension, size, whether it broadcasts) of each axis; of ``*s`` also how many axes it stands for."""
    rest = len(array.shape) - len(array.dims) + 1
    axes = iter(array.shape)
    for dim in array.dims:
        name, broadcasts = dim.strip("*#"), "#" in dim
        if not _is_variadic(dim):
            yield name, next(axes), broadcasts
            continue
        sizes = [next(axes) for _ in range(rest)]
        if dim != "...":
            yield f"*{name}", rest, False
            yield from ((f"*{name}[{place}]", size, broadcasts) for place, size in enumerate(sizes))


def _one(array: Given) -> str:
    return f"{array.name} is {list(array.shape)}; it must be {_shown(array.dims)}"


def _both(first: Given, second: Given) -> str:
    shapes = f"{first.name} is {list(first.shape)} and {second.name} {list(second.shape)}"
    ours, theirs = _shown(first.dims), _shown(second.dims)
    if ours != theirs:
        return f"{shapes}; they must be {ours} and {theirs}"
    if ours == "[...]":
        ours = "of one shape"
    mend = {(2, 1): " (broadcast_to_tokens spreads one number a row)"}
    return f"{shapes}; both must be {ours}{mend.get((len(first.shape), len(second.shape)), '')}"


def _shown(dims: tuple[str, ...]) -> str:
    if not dims:
        return "one number"
    return f"[{', '.join('...' if _is_variadic(dim) else dim.strip('#').upper() for dim in dims)}]"
