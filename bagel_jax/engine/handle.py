"""A request in work, as whoever asked for it sees it: its events as they come, its result, and a way to cancel it."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

from bagel_jax.engine.handoff import ContextKV
from bagel_jax.request import Request, Result


@dataclass(frozen=True)
class TextDelta:
    """Text that was decoded since the last one; all of them together are the answer."""

    text: str
    tokens: int  # how many tokens it took


@dataclass(frozen=True)
class Progress:
    """How far an image is: evaluations of the model."""

    done: int
    total: int


@dataclass(frozen=True)
class Done:
    """The last event: `Handle.result` returns, or raises, at once."""


Event = TextDelta | Progress | Done


class Cancelled(Exception):
    """A request was cancelled before it was done."""


class Handle:
    """A request that an engine works on. `await` it, or ask for its `result`.

    Args:
        request: the request.
        cancel: called with the handle to make the engine drop it.
        sink: takes the events; None: they are kept for `events`.
        watched: whether somebody looks at progress; `events` sets it.
    """

    def __init__(
        self,
        request: Request,
        cancel: Callable[[Handle], None],
        sink: Callable[[Handle, Event], None] | None = None,
        *,
        watched: bool = False,
    ):
        self.request = request
        self.watched = watched
        self._future: Future[Result | ContextKV] = Future()
        self._future.set_running_or_notify_cancel()  # a task that awaits it and is cancelled leaves it as it is
        self._cancel, self._sink = cancel, sink
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    @property
    def request_id(self) -> str:
        """The request's."""
        return self.request.request_id

    def done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Result | ContextKV:
        """The result (or the context, where only that was asked for), once it is there.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it took longer.
            Cancelled: the request was cancelled.
            Exception: whatever made it fail.
        """
        return self._future.result(timeout)

    def __await__(self):
        return asyncio.wrap_future(self._future).__await__()

    def events(self) -> Iterator[TextDelta | Progress]:
        """The request's events from its beginning, as they come; ends when it is done, however it ends. Once only."""
        self.watched = True
        while not isinstance(event := self._events.get(), Done):
            yield event

    async def __aiter__(self) -> AsyncIterator[TextDelta | Progress]:
        """`events`, for `async for`."""
        self.watched = True
        while not isinstance(event := await asyncio.to_thread(self._events.get), Done):
            yield event

    def cancel(self) -> bool:
        """Drops the request; its `result` raises `Cancelled` from now on. False if it is done already."""
        if not self.finish(Cancelled(f"request {self.request_id} was cancelled")):
            return False
        self._cancel(self)
        return True

    def tell(self, event: Event) -> None:
        """Passes an event on; for the engine."""
        if self._sink is not None:
            self._sink(self, event)
        else:
            self._events.put(event)

    def finish(self, outcome: Result | ContextKV | Exception) -> bool:
        """Sets the outcome, unless there is one; for the engine."""
        try:
            if isinstance(outcome, Exception):
                self._future.set_exception(outcome)
            else:
                self._future.set_result(outcome)
        except InvalidStateError:  # somebody was faster: a cancel and a result may come together
            return False
        self.tell(Done())
        return True
