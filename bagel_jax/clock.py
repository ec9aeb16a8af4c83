"""Time that goes into compiling, which is counted apart from the work itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
# Start and end of each stretch of compiling in this process, by time.perf_counter(); old ones are forgotten.
_compiling: deque[tuple[float, float]] = deque(maxlen=10_000)


def _note_compiling(event: str, seconds: float, **_: Any) -> None:
    if event in _COMPILE_EVENTS:
        end = time.perf_counter()
        # Tracing a function traces those it calls; theirs were noted first and lie within.
        while _compiling and _compiling[-1][0] >= end - seconds:
            _compiling.pop()
        _compiling.append((end - seconds, end))


jax.monitoring.register_event_duration_secs_listener(_note_compiling)


class Clock:
    """Seconds by phase; time that goes into compiling is a phase of its own."""

    def __init__(self):
        self.seconds = {"compile": 0.0}

    def add(self, name: str, started: float, ended: float) -> None:
        """Counts a stretch of time, start and end by `time.perf_counter()`."""
        within = ((max(start, started), min(end, ended)) for start, end in _compiling)
        compiling = sum(end - start for start, end in within if end > start)
        self.seconds["compile"] += compiling
        self.seconds[name] = self.seconds.get(name, 0.0) + ended - started - compiling

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the work inside, which must have finished on the device when it ends."""
        started = time.perf_counter()
        yield
        self.add(name, started, time.perf_counter())
