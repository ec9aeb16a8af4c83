"""Time that goes into compiling, which is counted apart from the work itself."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

import jax

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
# Start and end of each stretch of compiling, by time.perf_counter(), of each thread; old ones are forgotten.
_compiling: dict[int, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=10_000))


def _note_compiling(event: str, seconds: float, **_: Any) -> None:
    if event in _COMPILE_EVENTS:
        end = time.perf_counter()
        noted = _compiling[threading.get_ident()]
        # Tracing a function traces those it calls; theirs were noted first and lie within.
        while noted and noted[-1][0] >= end - seconds:
            noted.pop()
        noted.append((end - seconds, end))


jax.monitoring.register_event_duration_secs_listener(_note_compiling)


class Clock:
    """Seconds by phase; time in which one of some threads compiles is a phase of its own."""

    def __init__(self, threads: Iterable[int]):
        self.seconds = {"compile": 0.0}
        self._threads = tuple(threads)

    def add(self, phase: str, started: float, ended: float) -> None:
        """Counts a stretch of time, by time.perf_counter()."""
        compiling = 0.0
        for thread in self._threads:
            within = ((max(started, a), min(ended, b)) for a, b in list(_compiling[thread]))
            compiling += sum(b - a for a, b in within if b > a)
        compiling = min(compiling, ended - started)
        self.seconds["compile"] += compiling
        self.seconds[phase] = self.seconds.get(phase, 0.0) + ended - started - compiling
