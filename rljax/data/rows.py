"""Rows, one dict each, from local files and folders, gs://, the Hub, and generated tasks."""

import csv
import gzip
import inspect
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow
import pyarrow.parquet
from etils import epath

from rljax.data import arithmetic, constraints, countdown, stories

Row = dict[str, Any]

# Tasks made on the spot: make_rows(split=..., **options) -> rows.
GENERATED: dict[str, Callable[..., list[Row]]] = {
    "arithmetic": arithmetic.make_rows,
    "arithmetic_comparisons": arithmetic.make_comparisons,
    "arithmetic_pairs": arithmetic.make_pairs,
    "constraints": constraints.make_rows,
    "countdown": countdown.make_rows,
    "stories": stories.make_rows,
}

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".txt")


class DataError(ValueError):
    """A data file or a row that cannot be used; the message says which, and the mend."""


def load_rows(
    source: str,
    split: str = "train",
    *,
    columns: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> list[Row]:
    """The rows of ``source``: a file, a folder with files named after their split, a Hub name, or a generated task.

    ``columns`` maps our names to the source's, ``{"prompt": "question"}``; each one named has to be in every row. The
    other columns stay as they are. ``options`` go to a generated task, or, such as ``name`` and
    ``split``, to the Hub. A .txt file gives one row ``{"text": line}`` a line. Raises DataError.
    """
    options = dict(options or {})
    if source in GENERATED:
        _check_options(source, options)
        rows = GENERATED[source](split=split, **options)
    elif (path := epath.Path(source).expanduser()).exists() or _looks_like_a_path(source):
        rows = _load_local(path, split)
    else:
        rows = _load_hub(source, split, options)
    if not rows:
        raise DataError(f"{source} has no rows in split {split!r}; give a file that is not empty")
    return rename_columns(rows[:limit], columns or {}, where=f"{source} ({split})")


def _check_options(task: str, options: Mapping[str, Any]) -> None:
    """That a generated task has these options and takes what they say."""
    known = {name: p.annotation for name, p in inspect.signature(GENERATED[task]).parameters.items() if name != "split"}
    for option, value in options.items():
        if option not in known:
            raise DataError(f"the task {task} has no option {option!r}; it has {', '.join(known)}")
        if isinstance(value, str) != (known[option] is str) and known[option] in (int, float, str):
            raise DataError(f"option {option} of the task {task} is {value!r}; it takes {known[option].__name__}")


def rename_columns(rows: list[Row], columns: Mapping[str, str], *, where: str) -> list[Row]:
    """Rows under our names. Raises DataError for a row without one of the columns."""
    renamed = []
    for number, row in enumerate(rows):
        for ours, theirs in columns.items():
            if row.get(theirs) is None:
                present = ", ".join(key for key, value in row.items() if value is not None)
                raise DataError(
                    f"row {number} of {where} has no column {theirs!r} for {ours!r}; it has {present or 'nothing'}"
                )
        taken = set(columns.values())
        kept = {key: value for key, value in row.items() if key not in taken}
        renamed.append(kept | {ours: row[theirs] for ours, theirs in columns.items()})
    return renamed


def _looks_like_a_path(source: str) -> bool:
    return "://" in source or source.startswith(("/", ".", "~")) or source.endswith(SUFFIXES)


def _load_local(path: epath.Path, split: str) -> list[Row]:
    if not path.exists():
        raise DataError(f"data file {path} does not exist")
    if not path.is_dir():
        return read_file(path)
    inside = sorted(file for folder in (path, path / "data") if folder.is_dir() for file in folder.iterdir())
    files = [file for file in inside if file.name.startswith(split) and file.name.endswith(SUFFIXES)]
    files = [file for file in files if not file.name[len(split)].isalpha()]  # "test" is not "testing"
    if not files:
        names = ", ".join(file.name for file in inside) or "nothing"
        raise DataError(f"folder {path} has no file for split {split!r}, such as {split}.jsonl; it has {names}")
    return [row for file in files for row in read_file(file)]


def read_file(path: epath.PathLike) -> list[Row]:
    """The rows of one file, by its suffix. Raises DataError."""
    path = epath.Path(path)
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"data file {path} is of no known kind; known are {', '.join(SUFFIXES)}")
    data = path.read_bytes()
    if not data.strip():
        raise DataError(f"data file {path} is empty")
    if path.suffix == ".parquet":
        try:
            return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        except pyarrow.ArrowException as error:
            raise DataError(f"data file {path} is not readable parquet: {str(error).splitlines()[0]}") from error
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise DataError(f"data file {path} is not readable gzip: {error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"data file {path} is not UTF-8 at line {line}") from error
    if path.suffix == ".txt":
        return [{"text": line} for line in text.splitlines() if line.strip()]
    if path.suffix == ".csv":
        return _parse_csv(text, path)
    return _parse_json(text, path)


def _parse_json(text: str, path: epath.Path) -> list[Row]:
    """One array of objects, or one object a line."""
    numbered: list[tuple[int | None, str]] = [(None, text)]
    if not text.lstrip().startswith("["):
        numbered = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows: list[Row] = []
    for number, piece in numbered:
        try:
            value = json.loads(piece)
        except json.JSONDecodeError as error:
            line = error.lineno if number is None else number
            raise DataError(f"data file {path} is malformed at line {line}: {error.msg}") from error
        for index, row in enumerate([value] if number else value):
            if not isinstance(row, dict):
                place = f"line {number}" if number else f"entry {index}"
                raise DataError(f"data file {path} has a {type(row).__name__} at {place} where a row must be an object")
            rows.append(row)
    return rows


def _parse_csv(text: str, path: epath.Path) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"data file {path} is malformed at line {reader.line_num}: "
                    f"it does not have the header's {len(reader.fieldnames or [])} columns"
                )
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"data file {path} is malformed at line {reader.line_num}: {error}") from error
    return rows


def _load_hub(name: str, split: str, options: dict[str, Any]) -> list[Row]:
    """A data set of the Hub, or a local folder, through ``datasets``."""
    import datasets  # a second to import, and only this path needs it

    try:
        loaded = datasets.load_dataset(name, **{"split": split, **options})
    except Exception as error:  # offline, unknown name, unknown split, gated: datasets has a class for each
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        generated = ", ".join(GENERATED)
        raise DataError(
            f"{name} is neither a file, nor a generated task ({generated}), nor a data set that the Hub gives: {reason}"
        ) from error
    return loaded.to_list()
