"""The run folder, local or ``gs://``: ownership checks, versions, and JSON-lines files."""

import errno
import json
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

from rljax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "transformers", "datasets", "numpy")
TOKEN = ".launch"
_ALONE = 0  # the status that a process reports when it has nothing to complain of


class RunFolderError(ValueError):
    """The output folder cannot be used."""


class ConfigMismatch(RunFolderError):
    """The output folder holds a run that another config began."""


def open_run(
    output_dir: epath.PathLike,
    config: Mapping[str, Any],
    versions: Mapping[str, Any],
    *,
    identity_keys: Sequence[str],
    process_index: int = 0,
    gather: Callable[[int], Sequence[int]] = lambda number: [number],
) -> epath.Path:
    """Makes the folder, or goes on in the one this run began; writes config.json, config.txt and versions.json there.

    Refused are a folder with other things in it, one whose run differs under ``identity_keys`` (dotted, a key stands
    for all below it), and with several processes one that not all of them see. Every process calls it; ``gather`` gives
    every process the list of all processes' small numbers. A config or versions file that a resumed run changes is kept
    as config.1.json and so on.
    """
    folder = epath.Path(output_dir)
    folder = folder if is_remote(folder) else folder.expanduser().resolve()
    _check_shared(folder, process_index, gather)
    try:
        _check_owner(folder, config, identity_keys)
    except RunFolderError:
        if process_index == 0:
            (folder / TOKEN).unlink(missing_ok=True)  # nothing of ours stays in a folder that is not ours
        raise
    gather(_ALONE)  # nobody writes before everybody has compared
    if process_index == 0:
        with said_if_full(folder):
            _replace(folder, "config.json", _pretty(config))
            _replace(folder, "config.txt", "".join(f"{key} = {value!r}\n" for key, value in flatten(config).items()))
            _replace(folder, "versions.json", _pretty(versions))
    gather(_ALONE)
    return folder


def is_remote(path: epath.PathLike) -> bool:
    return "://" in str(path)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, sorted by key; an empty group stands for itself."""
    flat: dict[str, Any] = {}
    for key in sorted(config):
        value = config[key]
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _check_shared(folder: epath.Path, process_index: int, gather: Callable[[int], Sequence[int]]) -> None:
    """Process 0 leaves a number in the folder; whoever does not find it there looks at another folder."""
    token, trouble = secrets.randbelow(2**31 - 1) + 1, "process 0 says why"
    if process_index == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / TOKEN).write_text(str(token))
        except (OSError, ImportError) as error:  # ImportError: gs:// without gcsfs
            token, trouble = 0, str(error).splitlines()[0]
    token = gather(token)[0]
    if token == 0:
        raise RunFolderError(f"output_dir {folder} cannot be written ({trouble}); name another folder")
    seen = (folder / TOKEN).exists() and (folder / TOKEN).read_text() == str(token)
    blind = [index for index, sees in enumerate(gather(int(seen))) if not sees]
    if blind:
        raise RunFolderError(
            f"output_dir {folder} is not shared: what process 0 writes there, processes {blind} do not see; "
            "name a folder on a common disk or a gs:// path"
        )


def _check_owner(folder: epath.Path, config: Mapping[str, Any], identity_keys: Sequence[str]) -> None:
    if not (folder / "config.json").exists():
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others:
            raise RunFolderError(
                f"output_dir {folder} holds {others[0]!r} but no config.json of a run; name an empty or a new folder"
            )
        return
    try:
        begun = flatten(json.loads((folder / "config.json").read_text()))
    except ValueError as error:
        raise RunFolderError(f"{folder / 'config.json'} is not JSON ({error}); name another output_dir") from error
    ours = flatten(json.loads(_pretty(config)))  # tuples as JSON has them
    for key in sorted({**begun, **ours}):
        if any(f"{key}.".startswith(f"{identity}.") for identity in identity_keys) and begun.get(key) != ours.get(key):
            raise ConfigMismatch(
                f"output_dir {folder} belongs to another run: {key} is {begun.get(key)!r} there and {ours.get(key)!r} "
                "here; set it back or name a new output_dir"
            )


def versions(*, seed: int, command: Sequence[str] | None = None) -> dict[str, Any]:
    """What made a run: packages, source, machine, seed and command, for versions.json."""
    commit, dirty = _source()
    device = jax.devices()[0]
    return {
        "rljax": __version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "device_kind": device.device_kind,
        "device_platform": device.platform,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "seed": seed,
        "command": shlex.join([sys.executable, *sys.argv] if command is None else command),
    }


def _source() -> tuple[str | None, bool | None]:
    """Commit of the checkout that rljax runs from and whether it was changed; (None, None) for an installed copy."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def check_space(folder: epath.PathLike, needed_bytes: int) -> None:
    """Raises RunFolderError where a local disk has not ``needed_bytes`` left; object stores have no end."""
    if is_remote(folder):
        return
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise RunFolderError(
            f"output_dir {folder} has {free / 2**30:.3f} GiB free and the run needs {needed_bytes / 2**30:.3f} GiB; "
            "free some, keep fewer checkpoints or name another folder"
        )


@contextmanager
def said_if_full(path: epath.PathLike) -> Iterator[None]:
    """Turns a full disk into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFolderError(f"no space left to write {path}; free some and start the same command again") from error


def _pretty(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _replace(folder: epath.Path, name: str, text: str) -> None:
    """Writes whole or not at all; what stood there and differs is kept under a number."""
    path = folder / name
    if path.exists():
        if path.read_text() == text:
            return
        stem, suffix = name.split(".")
        number = next(n for n in range(1, 1_000_000) if not (folder / f"{stem}.{n}.{suffix}").exists())
        (folder / f"{stem}.{number}.{suffix}").write_text(path.read_text())
    written = folder / f".{name}.new"
    written.write_text(text)
    written.replace(path)


class JsonLines:
    """A file of JSON objects, one a line, that grows by whole lines.

    Every line reaches the operating system as it is appended, so a killed process loses none. Object stores cannot
    append: there the file grows on a local disk and is copied up at ``flush``, and by itself every ``upload_every_s``.
    """

    def __init__(self, path: epath.PathLike, *, upload_every_s: float = 60.0):
        self.path = epath.Path(path)
        self._upload_every_s, self._uploaded_at = upload_every_s, time.monotonic()
        self._spool = tempfile.TemporaryDirectory(prefix="rljax-") if is_remote(path) else None
        self._local = Path(self._spool.name, self.path.name) if self._spool else Path(self.path)
        if self._spool and self.path.exists():
            self._local.write_bytes(self.path.read_bytes())
        self._file = self._local.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        """``record`` must be strict JSON: no NaN, no infinity."""
        line = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode()
        with said_if_full(self.path):
            while line:  # a nearly full disk takes a part
                line = line[self._file.write(line) :]
        if time.monotonic() - self._uploaded_at > self._upload_every_s:
            self.flush()

    def flush(self) -> None:
        """Local: nothing left to do. Object store: copies the file up; call it before a checkpoint counts on it."""
        if self._spool:
            self.path.write_bytes(self._local.read_bytes())
            self._uploaded_at = time.monotonic()

    def truncate_after(self, step: int) -> None:
        """Drops records of later steps, and a last line that a kill cut short."""
        with self._local.open(encoding="utf-8", newline="\n") as file:
            lines = list(file)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) == len(lines):
            return
        self._file.close()
        shorter = self._local.with_name(f".{self._local.name}.new")
        shorter.write_text("".join(kept), encoding="utf-8")
        shorter.replace(self._local)
        self._file = self._local.open("ab", buffering=0)
        self.flush()

    def records(self) -> list[dict[str, Any]]:
        """What was written so far."""
        return [json.loads(line) for line in self._local.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        self._file.close()
        self.flush()
        if self._spool:
            self._spool.cleanup()
