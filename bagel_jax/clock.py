"""Time that goes into compiling, which is counted apart from the work itself."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

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
        mine = _compiling[threading.get_ident()]
        # Tracing a function traces those it calls; theirs were noted first and lie within.
        while mine and mine[-1][0] >= end - seconds:
            mine.pop()
        mine.append((end - seconds, end))


jax.monitoring.register_event_duration_secs_listener(_note_compiling)


class Span(NamedTuple):
    """A stretch of time that went into a phase of a request's work."""

    phase: str
    started: float  # by time.perf_counter()
    ended: float
    thread: int  # that worked

    @classmethod
    def here(cls, phase: str, started: float, ended: float) -> Span:
        """A span of work in the calling thread."""
        return cls(phase, started, ended, threading.get_ident())


class Clock:
    """Seconds by phase; time that goes into compiling is a phase of its own."""

    def __init__(self):
        self.seconds = {"compile": 0.0}

    @classmethod
    def of(cls, spans: Iterable[Span]) -> Clock:
        """The clock of a request's spans."""
        clock = cls()
        for span in spans:
            clock.add(span)
        return clock

    def add(self, span: Span) -> None:
        """Counts a stretch of time."""
        name, started, ended, thread = span
        within = ((max(start, started), min(end, ended)) for start, end in list(_compiling[thread]))
        compiling = sum(end - start for start, end in within if end > start)
        self.seconds["compile"] += compiling
        self.seconds[name] = self.seconds.get(name, 0.0) + ended - started - compiling
