"""What all drivers share: requests come in with handles, events go out to them, seconds are counted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

from bagel_jax.clock import Clock
from bagel_jax.engine.core import Engine
from bagel_jax.engine.handle import Handle
from bagel_jax.engine.handoff import ContextKV
from bagel_jax.engine.ticket import Cancel, Command, Done, Event, Submit
from bagel_jax.errors import InputError
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.request import Result

# A call of stage 1 lasts about so many seconds at most, so that others can join and cancelling is heard of.
CALL_SECONDS = 0.25


class Driver:
    """Requests in work on an engine, as people see them.

    Args:
        engine: the engine, which nobody else touches from now on.
        load_seconds: what loading took, for the results' `seconds`.
    """

    def __init__(self, engine: Engine, load_seconds: float | None = None):
        self.engine, self._load_seconds = engine, load_seconds
        self._inbox = threading.Condition()  # its lock guards all that follows
        self._commands: deque[Command] = deque()
        self._handles: dict[str, Handle] = {}
        self._changes = 0  # goes up whenever there may be something new to do
        # Seconds that evaluations took, the last few of each `DenoiseStage.size`.
        self._pace: dict[tuple, deque[float]] = {}
        self._last_done = 0.0

    def submit(
        self,
        prepared: Prepared,
        *,
        context: ContextKV | None = None,
        only_context: bool = False,
        sink: Callable[[Handle, Event], None] | None = None,
    ) -> Handle:
        """Takes a request in and returns at once.

        Args:
            prepared: the request.
            context: its context, computed elsewhere: stage 0 is left out.
            only_context: end with the request's `ContextKV` instead of a result.
            sink: see `Handle`.

        Raises:
            InputError: its id is in work already, or it makes no image where a context is concerned.
        """
        request = prepared.request
        if (context is not None or only_context) and not request.makes_image:
            raise InputError(f"{request.modality} has no context to hand over; text2img and img2img have")
        handle = Handle(request, self._cancel, sink)
        with self._inbox:
            if request.request_id in self._handles:
                raise InputError(f"request_id {request.request_id!r} is already in work; each request needs its own")
            self._handles[request.request_id] = handle
            self._commands.append(Submit(prepared, context, only_context))
            self._changed()
        return handle

    def close(self) -> None:
        """Cancels what is in work and waits until the engine has let go of it."""
        with self._inbox:
            handles = list(self._handles.values())
        for handle in handles:
            handle.cancel()

    def _changed(self) -> None:
        """A command has come in; the lock is held."""
        self._notify()

    def _notify(self) -> None:
        """There may be something new to do; the lock is held."""
        self._changes += 1
        self._inbox.notify_all()

    def _cancel(self, handle: Handle) -> None:
        """What a handle calls that was cancelled."""
        with self._inbox:
            if self._handles.get(handle.request_id) is handle:
                del self._handles[handle.request_id]
                self._commands.append(Cancel(handle.request_id))
                self._changed()

    def _drain(self) -> list[Command]:
        with self._inbox:
            commands = list(self._commands)
            self._commands.clear()
        return commands

    def _deliver(self, events: Iterable[tuple[Handle, Event]], threads: Iterable[int]) -> None:
        """Tells handles; `threads` are those in which programs are compiled."""
        for handle, event in events:
            if not isinstance(event, Done):
                handle.tell(event)
                continue
            if isinstance(event.outcome, Result):
                _count(event.outcome, event, self._load_seconds, threads)
            handle.finish(event.outcome)

    def _whose(self, events: Iterable[Event]) -> list[tuple[Handle, Event]]:
        """Events with their handles; those of requests that were cancelled meanwhile are left out."""
        found = []
        with self._inbox:
            # Of these the engine has not heard yet: under such an id it speaks of the request that is gone.
            cancelled = {one.request_id for one in self._commands if isinstance(one, Cancel)}
            for event in events:
                handle = self._handles.get(event.request_id)
                if handle is None or event.request_id in cancelled:
                    continue
                found.append((handle, event))
                if isinstance(event, Done):
                    del self._handles[event.request_id]
        return found

    def _evaluations(self) -> int:
        """How many evaluations a call of stage 1 should take."""
        pace = self._pace.get(self.engine.denoise.size)
        return 1 if pace is None else max(1, int(CALL_SECONDS / max(median(pace), 1e-6)))

    def _done(self, stage: str, ended: float) -> None:
        """Notes when a stage's oldest call was done; so it learns how long evaluations take."""
        try:
            call = self.engine.calls(stage)[0]
        except IndexError:  # another thread has had all calls dropped meanwhile
            return
        if call.evaluations:
            seconds = ended - max(call.since, self._last_done)
            self._pace.setdefault(call.size, deque(maxlen=5)).append(seconds / call.evaluations)
            self._last_done = ended


def _count(result: Result, done: Done, load_seconds: float | None, threads: Iterable[int]) -> None:
    """Fills in what a request took; compiling is a phase of its own."""
    clock = Clock(threads)
    for span in done.spans:
        clock.add(*span)
    result.seconds = {"load": load_seconds, **clock.seconds}
    if result.decoded_tokens:
        result.tokens_per_second = result.decoded_tokens / max(clock.seconds.get("decode", 0.0), 1e-9)
