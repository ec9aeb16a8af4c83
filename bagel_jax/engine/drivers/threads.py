"""The driver with threads: one a stage, or one for both by turns.

A thread dispatches what its stage can do, then waits for its oldest call, outside of all locks, and reads it. So the
device is never without work, and the stages overlap. Threads live as long as there are requests, and where there is
nothing to do they wait for a notification, never for a time-out.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from typing import NamedTuple

from bagel_jax.engine.core import Engine
from bagel_jax.engine.drivers.driver import Driver
from bagel_jax.engine.handle import Handle
from bagel_jax.engine.ticket import DENOISE, STAGES, Collect, Command, Event, Run

_LOG = logging.getLogger(__name__)


class Stretch(NamedTuple):
    """A stretch of time in which a stage had a call in flight."""

    phase: str
    started: float  # by time.perf_counter()
    ended: float


class ThreadDriver(Driver):
    """An engine with threads of its own.

    Args:
        engine, load_seconds: see `Driver`.
        by_turns: one thread for both stages.
    """

    def __init__(self, engine: Engine, load_seconds: float | None = None, *, by_turns: bool = False):
        super().__init__(engine, load_seconds)
        self._lives = [STAGES] if by_turns else [(stage,) for stage in STAGES]
        self._threads: dict[tuple[str, ...], threading.Thread] = {}
        self._ids: set[int] = set()
        self._stepping = threading.Lock()  # held while the engine is touched
        self._untold: deque[tuple[Handle, Event]] = deque()  # in the order in which it came from the engine
        self._telling = threading.Lock()  # held by the thread that tells
        self.work: deque[Stretch] = deque(maxlen=100_000)  # of which old ones are forgotten

    def close(self) -> None:
        """See `Driver.close`."""
        super().close()
        with self._inbox:
            threads = list(self._threads.values())
        if threading.current_thread() in threads:  # a listener's call: the others may need this very thread to end
            return
        for thread in threads:
            thread.join()

    def _changed(self) -> None:
        self._notify()
        for stages in self._lives:
            if stages not in self._threads:
                thread = threading.Thread(target=self._live, args=(stages,), name=f"bagel-{'+'.join(stages)}")
                self._threads[stages] = thread
                thread.start()

    def _live(self, stages: tuple[str, ...]) -> None:
        """A thread's life."""
        with self._inbox:
            self._ids.add(threading.get_ident())
        while True:
            with self._inbox:
                in_flight = any(self.engine.pending(stage) is not None for stage in stages)
                if not (self._handles or self._commands or in_flight):
                    del self._threads[stages]
                    self._ids.discard(threading.get_ident())
                    return
                seen = self._changes
            worked = self._turn(stages)
            with self._inbox:
                if not worked and self._changes == seen and (self._handles or self._commands):
                    self._inbox.wait()

    def _turn(self, stages: tuple[str, ...]) -> bool:
        """Dispatches what can be, then waits for a call of each stage and reads it; says whether anything was done."""
        worked = self._step([Run(stage, self._limit(stage)) for stage in stages])
        for stage in stages:
            ready = self.engine.pending(stage)
            if ready is None:
                continue
            started = time.perf_counter()
            with contextlib.suppress(Exception):  # it is heard of when the call is read
                ready.block_until_ready()
            ended = time.perf_counter()
            self.work.append(Stretch(stage, started, ended))
            self._done(stage, ended)
            self._step([Collect(stage)])
            worked = True
        return worked

    def _limit(self, stage: str) -> int | None:
        return self._evaluations() if stage == DENOISE else None

    def _step(self, commands: list[Command]) -> bool:
        """Has the engine carry out what has come in and these; says whether that changed anything."""
        with self._stepping:
            waiting = self._drain()
            dispatched = self.engine.dispatched
            now = time.perf_counter()
            try:
                events = self.engine.step([*waiting, *commands], now)
            except Exception as error:  # a fault of ours: whoever waits is told, instead of waiting for ever
                _LOG.exception("the engine failed")
                events = self.engine.give_up(error)
            self._untold += self._whose(events)
        changed = bool(waiting or events) or self.engine.dispatched != dispatched or isinstance(commands[0], Collect)
        if changed:
            with self._inbox:
                self._notify()
        self._tell()
        return changed

    def _tell(self) -> None:
        """Tells what has come, in order, one thread at a time.

        The other one goes on with its work meanwhile: it may not wait, since a listener may wait for its end.
        """
        while self._untold and self._telling.acquire(blocking=False):
            try:
                while self._untold:
                    self._deliver([self._untold.popleft()], self._ids)
            finally:
                self._telling.release()
