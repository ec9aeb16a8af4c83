"""A request in work, as whoever asked for it sees it: its events as they come, its result, and a way to cancel it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, InvalidStateError

from bagel_jax.engine.handoff import ContextKV
from bagel_jax.engine.ticket import Done, Event, Progress, TextDelta
from bagel_jax.request import Request, Result


class Cancelled(Exception):
    """A request was cancelled before it was done."""


class Handle:
    """A request that an engine works on. `await` it, or ask for its `result`.

    Every listener (`events`, `async for`) hears all events from the beginning, also one that comes when the request is
    done; an asynchronous one has a queue of its event loop and takes no thread.

    Args:
        request: the request.
        cancel: called with the handle to make the engine drop it.
        sink: called with the handle and each event, in a thread of the engine; if it raises, the request fails.
    """

    def __init__(
        self,
        request: Request,
        cancel: Callable[[Handle], None],
        sink: Callable[[Handle, Event], None] | None = None,
    ):
        self.request = request
        self._future: Future[Result | ContextKV] = Future()
        self._future.set_running_or_notify_cancel()  # a task that awaits it and is cancelled leaves it as it is
        self._cancel, self._sink = cancel, sink
        self._lock = threading.Lock()  # guards the two below
        self._heard: list[Event] = []
        self._listeners: list[Callable[[Event], None]] = []

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
        """The request's events from its beginning, as they come; ends when it is done, however it ends."""
        heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._listen(heard.put)
        while not isinstance(event := heard.get(), Done):
            yield event

    async def __aiter__(self) -> AsyncIterator[TextDelta | Progress]:
        """`events`, for `async for`."""
        heard: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._listen(lambda event: loop.call_soon_threadsafe(heard.put_nowait, event))
        while not isinstance(event := await heard.get(), Done):
            yield event

    def cancel(self) -> bool:
        """Drops the request; its `result` raises `Cancelled` from now on. False if it is done already."""
        if not self.finish(Cancelled(f"request {self.request_id} was cancelled")):
            return False
        self._cancel(self)
        return True

    def tell(self, event: Event) -> None:
        """Passes an event on; for the engine. What a sink raises becomes the request's outcome, if it has none."""
        with self._lock:
            self._heard.append(event)
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(event)
            except RuntimeError:  # its event loop is closed: nobody listens any more
                with self._lock:
                    if listener in self._listeners:  # a cancel may tell at the same time
                        self._listeners.remove(listener)
        if self._sink is None:
            return
        try:
            self._sink(self, event)
        except BaseException as error:  # SystemExit too, or the engine's thread would end, and with it all requests
            self._sink = None
            if self.finish(error):
                self._cancel(self)

    def finish(self, outcome: Result | ContextKV | BaseException) -> bool:
        """Sets the outcome, unless there is one; for the engine."""
        try:
            if isinstance(outcome, BaseException):
                self._future.set_exception(outcome)
            else:
                self._future.set_result(outcome)
        except InvalidStateError:  # somebody was faster: a cancel and a result may come together
            return False
        self.tell(Done(self.request_id, outcome))
        return True

    def _listen(self, listener: Callable[[Event], None]) -> None:
        with self._lock:
            for event in self._heard:
                listener(event)
            self._listeners.append(listener)
