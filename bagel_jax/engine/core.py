"""The engine: two stages, each with its own queue, batch size and device, working at the same time.

The only room that knows both stages. Each stage belongs to one thread, which alone touches it (with the topology
`single-stage` one thread turns from one to the other); everything that goes between threads goes through the queues
here, under one lock, and is keyed by request id; an id that was cancelled may be taken again at once, so that what a
stage still says of it is of the request before. A thread lives as long as there is a request in the engine, and waits
for a notification, never for a time-out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from bagel_jax.clock import Clock, Span
from bagel_jax.config import BagelConfig
from bagel_jax.engine.context.stage import ContextStage, Finished, Tokens
from bagel_jax.engine.denoise.stage import DenoiseStage, Drawn, Steps
from bagel_jax.engine.handle import Done, Handle, Progress, TextDelta
from bagel_jax.engine.handoff import ContextKV, Failed
from bagel_jax.errors import InputError
from bagel_jax.inputs.images import to_image
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.models.weights import Weights
from bagel_jax.placement.mesh import stage_devices
from bagel_jax.request import Result
from bagel_jax.settings import ServingSettings

# A call of stage 1 lasts about so long at most where somebody watches, or where another request could join.
CALL_SECONDS = 0.25
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # decoded from the first bytes of a letter


@dataclass(eq=False)
class _Record:
    """What the engine knows of a request in work."""

    prepared: Prepared
    handle: Handle
    only_context: bool  # ends with its context
    result: Result
    spans: list[Span] = field(default_factory=list)
    untold: list[int] = field(default_factory=list)  # tokens whose text was not told yet
    said: str = ""  # text that was
    ready: float | None = None  # when stage 0 was done with it, by time.perf_counter()
    context: ContextKV | None = None  # given from outside


class Engine:
    """Answers requests with a loaded model.

    Args:
        weights: the model.
        config: its sizes.
        dtype: of the KV cache.
        tokenizer: the model's.
        settings: see `ServingSettings`.
        load_seconds: what loading took, for the results' `seconds`.

    Raises:
        InputError: there is no such device, or no memory for the KV cache.
    """

    def __init__(
        self,
        weights: Weights,
        config: BagelConfig,
        dtype,
        tokenizer: Tokenizer,
        settings: ServingSettings,
        load_seconds: float | None = None,
    ):
        self.settings, self._tokenizer, self._load_seconds = settings, tokenizer, load_seconds
        ours = (config, dtype, tokenizer, settings)
        ar_device, dit_device = stage_devices(settings.ar_device, settings.dit_device)
        self.ar = ContextStage(weights.on(ar_device), *ours)
        self.dit = DenoiseStage(weights.on(dit_device), *ours)
        # Stretches of work of each stage ("ar", "dit"), of which old ones are forgotten.
        self.work: deque[Span] = deque(maxlen=100_000)
        self._wake = threading.Condition()  # its lock guards all that follows
        self._records: dict[str, _Record] = {}
        self._new: deque[_Record] = deque()  # to stage 0
        self._ready: deque[_Record] = deque()  # whose contexts stage 1 has no room for yet
        self._moving: dict[_Record, int] = {}  # on the way to stage 1: pages
        self._arrived: deque[tuple[_Record, ContextKV]] = deque()  # to stage 1
        self._cancelled: tuple[deque[str], deque[str]] = deque(), deque()  # to tell each stage of
        self._threads: dict[str, threading.Thread] = {}
        self._changes = 0  # goes up whenever a thread may have something new to do

    def submit(
        self,
        prepared: Prepared,
        *,
        context: ContextKV | None = None,
        only_context: bool = False,
        sink: Callable[[Handle, TextDelta | Progress | Done], None] | None = None,
        watched: bool = False,
    ) -> Handle:
        """Takes a request in and returns at once.

        Args:
            prepared: the request.
            context: its context, computed elsewhere: stage 0 is left out.
            only_context: end with the request's `ContextKV` instead of a result.
            sink: called with the handle and each of its events, in a thread of the engine, instead of keeping events
                for `Handle.events`.
            watched: whether somebody looks at progress, so that calls should be short.

        Raises:
            InputError: its id is in work already, or it makes no image where a context is concerned.
        """
        request = prepared.request
        if (context is not None or only_context) and not request.makes_image:
            raise InputError(f"{request.modality} has no context to hand over; text2img and img2img have")
        if context is not None:
            self.dit.pages_needed(prepared, context.num_pages)
        handle = Handle(request, self._cancel, sink, watched=watched)
        result = Result(request.request_id, request.modality, notes=prepared.notes)
        record = _Record(prepared, handle, only_context, result, context=context)
        with self._wake:
            if request.request_id in self._records:
                raise InputError(f"request_id {request.request_id!r} is already in work; each request needs its own")
            self._records[request.request_id] = record
            if context is None:
                self._new.append(record)
            else:
                record.ready = time.perf_counter()
                self._ready.append(record)
            self._start_threads()
            self._changed()
        return handle

    def close(self) -> None:
        """Cancels what is in work and waits until both stages have let go of it."""
        with self._wake:
            handles = [record.handle for record in self._records.values()]
        for handle in handles:
            handle.cancel()
        with self._wake:
            threads = list(self._threads.values())
        for thread in threads:
            thread.join()

    def _changed(self) -> None:
        """Wakes both threads; the lock is held."""
        self._changes += 1
        self._wake.notify_all()

    def _start_threads(self) -> None:
        """Starts the threads that are not there; the lock is held."""
        turns = {"ar": [self._ar_turn], "dit": [self._dit_turn]}
        if self.settings.topology == "single-stage":
            turns = {"ar+dit": [self._ar_turn, self._dit_turn]}
        for name, mine in turns.items():
            if name not in self._threads:
                self._threads[name] = threading.Thread(target=self._live, args=(name, mine), name=f"bagel-{name}")
                self._threads[name].start()

    def _live(self, name: str, turns: list[Callable[[], bool]]) -> None:
        """A thread's life: turns as long as there are requests, waiting where there is nothing to do for it."""
        while True:
            with self._wake:
                if not self._records and not any(self._cancelled):
                    del self._threads[name]
                    return
                seen = self._changes
            try:
                worked = [turn() for turn in turns]
            except Exception as error:  # a fault of ours: whoever waits is told, instead of waiting for ever
                self._fail_all(error)
                continue
            with self._wake:
                if not any(worked) and self._changes == seen and self._records:
                    self._wake.wait()

    def _ar_turn(self) -> bool:
        """Stage 0 takes in what is new, hands over what there is room for, and takes a step; False: nothing to do."""
        with self._wake:
            new, dropped = _drain(self._new), _drain(self._cancelled[0])
        for request_id in dropped:  # first: an id that was cancelled may be taken again at once
            self.ar.cancel(request_id)
        for record in new:
            if record.handle.done():
                continue
            try:
                self.ar.submit(record.prepared)
                if record.prepared.request.makes_image:
                    self.dit.pages_needed(record.prepared, self.ar.pages_needed(record.handle.request_id))
            except Exception as error:
                self.ar.cancel(record.handle.request_id)
                self._end(record, error)
        moved = self._hand_over()
        if not self.ar.busy:
            return bool(new or dropped or moved)
        started = time.perf_counter()
        events = self.ar.step()
        self.work.append(Span.here("ar", started, time.perf_counter()))
        for record, event in self._whose(events, self._cancelled[0]):
            if isinstance(event, Tokens):
                self._tell_text(record, event.ids)
            elif isinstance(event, Failed):
                self._end(record, event.error)
            else:
                self._left_ar(record, event)
        return not self.ar.stalled or bool(events)

    def _hand_over(self) -> bool:
        """Moves contexts to stage 1, first come, first served, as long as there is room; says whether any was."""
        moved = False
        while True:
            with self._wake:
                if not self._ready:
                    return moved
                record = self._ready[0]
                request_id, given = record.handle.request_id, record.context
                if record.handle.done():  # cancelled meanwhile
                    self._ready.popleft()
                    continue
                pages = self.ar.pages_ready(request_id) if given is None else given.num_pages
                if pages is None or not self._has_room(record, pages):
                    return moved
                self._ready.popleft()
            moved = True
            try:
                context = (self.ar.take(request_id) if given is None else given).move(self.dit.place)
            except Exception as error:  # a device may be full
                with self._wake:
                    self._moving.pop(record)
                self.ar.cancel(request_id)
                self._end(record, error)
                continue
            with self._wake:
                self._arrived.append((record, context))
                self._changed()

    def _has_room(self, record: _Record, context_pages: int) -> bool:
        """Whether stage 1 can take a context, beside those on their way to it; if so, it is on its way."""
        pages = self.dit.pages_needed(record.prepared, context_pages)
        if self.dit.free_slots <= len(self._moving) or pages + sum(self._moving.values()) > self.dit.free_pages:
            return False
        self._moving[record] = pages
        return True

    def _left_ar(self, record: _Record, event: Finished) -> None:
        result, stats = record.result, event.stats
        if record.ready is not None:  # it was computed a second time, since the device failed
            return
        record.spans += stats.spans
        result.cached_prefix_tokens = stats.cached_tokens
        result.prefilled_tokens = stats.prefilled_tokens
        if event.ids is not None:
            result.text = self._tokenizer.answer(event.ids)
            result.time_to_first_token = stats.time_to_first_token
            clock = Clock.of(record.spans)
            result.tokens_per_second = stats.decoded_tokens / clock.seconds["decode"]
            self._tell_rest(record, result.text)
        if record.only_context:
            try:
                self._end(record, self.ar.take(event.request_id))
            except Exception as error:
                self.ar.cancel(event.request_id)
                self._end(record, error)
            return
        if not record.prepared.request.makes_image:
            self._end(record, result)
            return
        with self._wake:
            record.ready = time.perf_counter()
            self._ready.append(record)
            self._changed()

    def _dit_turn(self) -> bool:
        """Stage 1 takes in the contexts that have arrived and does some steps; False: there was nothing to do."""
        with self._wake:
            arrived, dropped = _drain(self._arrived), _drain(self._cancelled[1])
        for request_id in dropped:
            self.dit.cancel(request_id)
        for record, context in arrived:
            try:
                if not record.handle.done():
                    self.dit.submit(record.prepared, context)
                    record.spans.append(Span.here("wait", record.ready, time.perf_counter()))
                    record.handle.tell(Progress(0, record.prepared.request.settings.steps - 1))
            except Exception as error:
                self._end(record, error)
            with self._wake:
                self._moving.pop(record)
                self._changed()
        if not self.dit.busy:
            return bool(arrived or dropped)
        started = time.perf_counter()
        events = self.dit.step(self._patience())
        self.work.append(Span.here("dit", started, time.perf_counter()))
        for record, event in self._whose(events, self._cancelled[1]):
            if isinstance(event, Steps):
                record.handle.tell(Progress(event.done, event.total))
            elif isinstance(event, Failed):
                self._end(record, event.error)
            else:
                self._drawn(record, event)
        with self._wake:
            self._changed()  # there may be room now
        return True

    def _patience(self) -> float | None:
        """Seconds that a call of stage 1 should last at most; None: all steps, since nobody waits for anything."""
        with self._wake:
            watched = any(record.handle.watched for record in self._records.values())
            coming = (r.ready is None and r.prepared.request.makes_image for r in self._records.values())
            joining = self.dit.free_slots > 0 and any(coming)
        return CALL_SECONDS if watched or joining else None

    def _drawn(self, record: _Record, event: Drawn) -> None:
        started = time.perf_counter()
        record.result.latents, record.result.image = event.latents, to_image(event.pixels)
        record.spans += [*event.spans, Span.here("pixels", started, time.perf_counter())]
        self._end(record, record.result)

    def _whose(self, events: Iterable, cancelled: deque[str]) -> Iterator[tuple[_Record, object]]:
        """The events of a stage's step with their requests; those of requests that are gone are left out.

        Args:
            events: the stage's.
            cancelled: what the stage has not been told of yet: under such an id it speaks of the one that is gone.
        """
        for event in events:
            with self._wake:
                record = None if event.request_id in cancelled else self._records.get(event.request_id)
            if record is not None:
                yield record, event

    def _end(self, record: _Record, outcome: Result | ContextKV | Exception) -> None:
        """A request has left the engine, with a result or a reason."""
        with self._wake:
            if not self._forget(record):
                return
        if isinstance(outcome, Result):
            outcome.seconds = {"load": self._load_seconds, **Clock.of(record.spans).seconds}
        record.handle.finish(outcome)

    def _fail_all(self, error: Exception) -> None:
        with self._wake:
            records = list(self._records.values())
            for record in records:
                self._drop(record)
        for record in records:
            record.handle.finish(error)

    def _cancel(self, handle: Handle) -> None:
        """What a handle calls that was cancelled."""
        with self._wake:
            record = self._records.get(handle.request_id)
            if record is not None and record.handle is handle:
                self._drop(record)

    def _drop(self, record: _Record) -> None:
        """Forgets a request, and makes both stages drop it; the lock is held."""
        self._forget(record)
        for dropped in self._cancelled:
            dropped.append(record.handle.request_id)
        self._start_threads()

    def _forget(self, record: _Record) -> bool:
        """Takes a request out of the engine's books; False if it is not in them. The lock is held."""
        if self._records.get(record.handle.request_id) is not record:
            return False
        del self._records[record.handle.request_id]
        self._changed()
        return True

    def _tell_text(self, record: _Record, ids: list[int]) -> None:
        """Passes on the text that tokens add; the first bytes of a letter wait for its last."""
        record.untold += ids
        text = self._tokenizer.piece(record.untold)
        if text.endswith(_UNFINISHED):
            text = ""
        else:
            record.untold.clear()
        record.said += text
        record.handle.tell(TextDelta(text, len(ids)))

    def _tell_rest(self, record: _Record, text: str) -> None:
        """What an answer ends with that was no whole letter."""
        if text.startswith(record.said) and text != record.said:
            record.handle.tell(TextDelta(text[len(record.said) :], 0))


def _drain(things: deque) -> list:
    taken = list(things)
    things.clear()
    return taken
