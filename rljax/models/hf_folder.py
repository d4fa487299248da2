"""Model folders, local, in a bucket or on the Hub, and their JSON files."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from etils import epath

from rljax.models.hf_config import ModelFolderError

CONFIG_FILES = ("*.json", "*.model", "*.txt", "*.jinja")  # configs and tokenizers, no weights
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def local_folder(name: str | os.PathLike, patterns: Sequence[str] = CONFIG_FILES) -> Path:
    """The local folder of a model, with at least its files that match.

    A local path is used as it is. A bucket's files (``gs://...``) are copied to the temporary folder (TMPDIR), which
    must have room for them, and copied again only when they change. Anything else is a name on the Hub, downloaded to
    its cache.
    """
    text = os.path.expanduser(name)
    if "://" in text:
        return _copy_from_bucket(text, patterns)
    if Path(text).is_dir():
        return Path(text)
    if text.startswith((".", "/")) or text.count("/") > 1:
        raise ModelFolderError(f"model folder {text} does not exist")
    return _download(text, patterns)


def _copy_from_bucket(url: str, patterns: Sequence[str]) -> Path:
    source = epath.Path(url)
    target = Path(tempfile.gettempdir()) / f"rljax-model-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    target.mkdir(exist_ok=True)
    try:
        files = [file for file in source.iterdir() if any(fnmatch(file.name, pattern) for pattern in patterns)]
        _drop_stale(target, {file.name for file in files}, patterns)
        for file in files:
            _copy_if_changed(file, target / file.name)
    except (OSError, ImportError) as error:
        raise ModelFolderError(f"model folder {url} cannot be read: {error}") from error
    if not files:
        raise ModelFolderError(f"model folder {url} has no file like {' or '.join(patterns)}")
    return target


def _copy_if_changed(file: epath.Path, copy: Path) -> None:
    """A copy has the length and the time of what it was made from: weights trained further have the old length."""
    stat = file.stat()
    is_same = copy.exists() and (copy.stat().st_size, int(copy.stat().st_mtime)) == (stat.length, int(stat.mtime))
    if not is_same:
        partial = copy.with_name(f".{copy.name}.{os.getpid()}")  # several processes of one host may copy at once
        file.copy(partial, overwrite=True)
        os.utime(partial, (stat.mtime, stat.mtime))
        os.replace(partial, copy)


def _drop_stale(folder: Path, names: set[str], patterns: Sequence[str]) -> None:
    """Copies of files that the bucket has no more: an old index would lead to old weights."""
    for file in folder.iterdir():
        if file.name not in names and any(fnmatch(file.name, pattern) for pattern in patterns):
            file.unlink(missing_ok=True)


def _download(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # huggingface_hub has a dozen kinds, and httpx its own
        raise ModelFolderError(
            f"model {name!r} is not a local folder and could not be had from the Hugging Face Hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); give a path, or check the name and the network"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ModelFolderError(f"model folder {file.parent} has no {file.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelFolderError(f"{file} holds a {type(content).__name__} where a JSON object belongs")
    return content
