"""Assignment of rows to splits by their content, so that splits are disjoint whatever else is configured."""

import hashlib

SPLITS = ("train", "dev", "test")


def split_of(key: str) -> str:
    """The split that owns ``key``: eight tenths train, one dev, one test."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10
    return {8: "dev", 9: "test"}.get(bucket, "train")
