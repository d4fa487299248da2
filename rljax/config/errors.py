"""Errors in settings: one sentence that suggests the nearest valid name."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that cannot be used; the sentence names the key and the mend."""


def nearest(key: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a sentence about ``key``: the nearest name, by spelling or as its initials, else all there are."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    close = close or [name for name in known if "".join(word[:1] for word in name.split("_")) == key]
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; {otherwise or 'there are ' + (', '.join(sorted(known)) or 'none')}"
