"""What compiles: said while it does, and refused after the first step of its kind."""

import time
from collections.abc import Callable, Hashable

import jax

_TRACE_EVENT = "/jax/core/compile/jaxpr_trace_duration"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_EVENT = "/jax/compilation_cache/cache_hits"

# Programs by the name that they are compiled under, as a user reads of them. The small ones are not in it.
PROGRAMS = {
    "rollout": "the rollout",
    "rival_rollout": "the rollout of the mixed policy",
    "score_policy": "scoring by the policy",
    "score_reference": "scoring by the reference",
    "score_guide": "scoring by the guide",
    "teacher": "the teacher's top tokens",
    "values": "the critic's values",
    "reward": "the reward model's scores",
    "update": "the update",
    "evaluation": "the evaluation",
}


def named(name: str, function: Callable) -> Callable:
    """``function`` under a name of PROGRAMS, which ``jax.jit`` takes over. Raises KeyError for another one."""
    if name not in PROGRAMS:
        raise KeyError(name)
    function.__name__ = function.__qualname__ = name
    return function


class RecompileError(RuntimeError):
    """A step compiled although one like it had run before."""


class CompileCounter:
    """Counts every program that XLA compiles (or fetches from the persistent cache) in this process, as ``count``.

    ``programs`` counts those of PROGRAMS. ``say`` is told when one of them begins to compile, and in how many seconds
    it was done.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.count = 0
        self.programs = 0
        self.seconds = 0.0
        self._say = say
        self._began: dict[str, float] = {}
        self._from_cache = False
        self._seen: set[Hashable] = set()
        jax.monitoring.register_scalar_listener(self._begins)
        jax.monitoring.register_event_listener(self._happens)
        jax.monitoring.register_event_duration_secs_listener(self._ends)

    def _begins(self, event: str, value: float | int, **about: str | int) -> None:
        """A program is traced, or where it had been traced before, compiled."""
        if event not in (_TRACE_EVENT, _COMPILE_EVENT):
            return
        self._from_cache, name = False, _name(about)
        if self._say is not None and name in PROGRAMS and name not in self._began:
            self._began[name] = time.perf_counter()
            self._say(f"compiling {PROGRAMS[name]}")

    def _happens(self, event: str, **_: str | int) -> None:
        self._from_cache |= event == _CACHE_EVENT

    def _ends(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event != _COMPILE_EVENT:
            return
        self.count += 1
        self.seconds += duration_secs
        name = _name(about)
        self.programs += name in PROGRAMS
        if self._say is not None and name in self._began:
            cached = ", from the cache" if self._from_cache else ""
            self._say(f"compiled {PROGRAMS[name]} in {time.perf_counter() - self._began.pop(name):.1f} s{cached}")

    def check(self, kind: Hashable, compiled: int) -> None:
        """After a step in which so many programs compiled. Raises RecompileError where its ``kind`` is known."""
        if kind in self._seen and compiled:
            raise RecompileError(
                f"{compiled} programs were compiled again in a step of kind {kind}: a shape, a dtype or a "
                "layout changed between steps; set JAX_EXPLAIN_CACHE_MISSES=1 to see which"
            )
        self._seen.add(kind)

    def close(self) -> None:
        jax.monitoring.unregister_scalar_listener(self._begins)
        jax.monitoring.unregister_event_listener(self._happens)
        jax.monitoring.unregister_event_duration_listener(self._ends)


def _name(about: dict[str, str | int]) -> str:
    """Of what JAX compiles, jit(update) or update."""
    return str(about.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
