"""An object store in memory, behind gs:// paths."""

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """An object store: whole objects only, nothing is appended. The real one needs gcsfs and credentials."""

    protocol = ("gcs", "gs")
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("gs:/").removeprefix("/"))

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode and "+" not in mode
        return super()._open(path, mode, **kwargs)


@contextmanager
def played_bucket() -> Iterator[None]:
    """gs:// paths lead there, and what they held is gone afterwards."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    yield
    Bucket.store.clear()
