"""Recompilation guard: no program may compile after the first step of its kind."""

from collections.abc import Hashable

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class RecompileError(RuntimeError):
    """A step compiled although one like it had run before."""


class CompileCounter:
    """Counts every program that XLA compiles (or fetches from the persistent cache) in this process."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self._seen: set[Hashable] = set()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs

    def check(self, kind: Hashable, before: int) -> None:
        """After a step that began at ``count`` = ``before``. Raises RecompileError where a known ``kind`` compiled."""
        if kind in self._seen and self.count > before:
            raise RecompileError(
                f"{self.count - before} programs were compiled again in a step of kind {kind}: a shape, a dtype or a "
                "layout changed between steps; set JAX_EXPLAIN_CACHE_MISSES=1 to see which"
            )
        self._seen.add(kind)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
