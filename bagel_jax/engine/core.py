"""The engine: two stages and what goes between them, as a state machine.

`step(commands) -> events`: no thread, no lock, no clock in here. Commands come in, how far to go among them; what
goes out are events. The same commands give the same programs in the same order, on every host. Threads, hosts and time
are drivers around it (`drivers/`).

A request is a `Ticket` that both stages extend: stage 0 makes its context, which it leaves as a lease of pages; stage 1
takes leases from a queue of offers as it has room for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import jax

from bagel_jax.config import BagelConfig
from bagel_jax.engine.context.stage import CallFailed, ContextStage
from bagel_jax.engine.denoise.stage import DenoiseStage
from bagel_jax.engine.kv.store import make_stores
from bagel_jax.engine.ticket import (
    CONTEXT,
    Cancel,
    Collect,
    Command,
    Done,
    Event,
    Progress,
    Run,
    Submit,
    Ticket,
)
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.models.weights import Weights
from bagel_jax.placement.placement import Placement
from bagel_jax.request import Result
from bagel_jax.settings import EngineConfig


class Engine:
    """Both stages.

    Args:
        weights: the model, on the placement of each stage.
        placements: of stage 0 and stage 1; the very same one shares one store of keys and values.
        config: the model's sizes.
        dtype: of keys and values.
        tokenizer: the model's.
        settings: see `EngineConfig`.

    Raises:
        InputError: there is no memory for the KV cache, or the attention that is asked for takes no such model.
    """

    def __init__(
        self,
        weights: tuple[Weights, Weights],
        placements: tuple[Placement, Placement],
        config: BagelConfig,
        dtype,
        tokenizer: Tokenizer,
        settings: EngineConfig,
    ):
        stores = make_stores(placements, config, settings, dtype)
        self.context = ContextStage(weights[0], config, tokenizer, settings, stores[0])
        self.denoise = DenoiseStage(weights[1], config, tokenizer, settings, stores[1])
        self.tickets: dict[str, Ticket] = {}  # in work, by request id
        self.offers: deque[Ticket] = deque()  # whose contexts stage 1 has no room for yet
        self.dispatched = 0  # calls so far, and restarts: behind either there may be something new to do
        self._arrivals = 0
        self._events: list[Event] = []

    def step(self, commands: Iterable[Command], now: float = 0.0) -> list[Event]:
        """Carries out commands, one after another.

        Args:
            commands: see `ticket.py`.
            now: what time it is, in seconds of any clock; it is only noted.

        Returns:
            What has come of them, in order. Nothing is heard of a request behind its `Done`, or after its `Cancel`.
        """
        for command in commands:
            self._events += self._carry_out(command, now)
        if not self.tickets:
            self.check()
        return self._drained()

    def calls(self, stage: str) -> deque:
        """A stage's calls in flight, the oldest first."""
        return self._stage(stage).calls

    def pending(self, stage: str) -> jax.Array | None:
        """An array that is there when a stage's oldest call in flight is done; None where there is no call."""
        try:  # a driver may ask while another thread has all calls dropped
            return self.calls(stage)[0].ready
        except IndexError:
            return None

    def check(self) -> None:
        """That every page is home, as it must be when nothing is in work.

        Raises:
            RuntimeError: a page is held by nobody that there is.
        """
        for store in dict.fromkeys((self.context.store, self.denoise.store)):
            store.check()

    def give_up(self, error: Exception) -> list[Event]:
        """After a fault in here: everybody is told, and all begins anew, since the books may be wrong."""
        events = [*self._drained(), *(Done(request_id, error) for request_id in self.tickets)]
        for ticket in self.tickets.values():
            ticket.over = True
        self.tickets.clear()
        self.offers.clear()
        self.context.forget()
        self.denoise.forget()
        for store in dict.fromkeys((self.context.store, self.denoise.store)):
            store.forget()
        return events

    def _drained(self) -> list[Event]:
        """What there is to tell; kept until now, so that a fault in the middle of a step loses none of it."""
        events, self._events = self._events, []
        return events

    def _stage(self, stage: str) -> ContextStage | DenoiseStage:
        return self.context if stage == CONTEXT else self.denoise

    def _carry_out(self, command: Command, now: float) -> list[Event]:
        if isinstance(command, Submit):
            return self._submit(command, now)
        if isinstance(command, Cancel):
            ticket = self.tickets.get(command.request_id)
            if ticket is not None:
                self._forget(ticket)
            return []
        stage = self._stage(command.stage)
        try:
            if isinstance(command, Collect):
                found = stage.collect(now) if stage.calls else []
                return [*self._told(found, now), *(self._offer(now) if command.stage == CONTEXT else [])]
            self._run(command, now)
            return []
        except CallFailed as failure:
            return self._begin_again(stage, failure, now)

    def _submit(self, command: Submit, now: float) -> list[Event]:
        prepared = command.prepared
        request = prepared.request
        if request.request_id in self.tickets:
            raise RuntimeError(f"request_id {request.request_id!r} is in work already")
        result = Result(request.request_id, request.modality, notes=prepared.notes)
        ticket = Ticket(self._arrivals, prepared, command.given, command.only_context, now, result)
        self._arrivals += 1
        self.tickets[request.request_id] = ticket
        try:
            if ticket.given is not None:
                self.denoise.check(ticket, 0)
                ticket.enter("wait", now)
                self.offers.append(ticket)
                return self._told([_nothing_done(ticket)], now)
            else:
                image = request.makes_image and not ticket.only_context
                if image and self.context.store is self.denoise.store:
                    ticket.blocks = self.denoise.blocks_needed(ticket)
                self.context.submit(ticket)
                if image:
                    self.denoise.check(ticket, self.context.pages_needed(ticket))
        except Exception as error:
            return self._end(ticket, error, now)
        return []

    def _run(self, command: Run, now: float) -> None:
        if command.stage == CONTEXT:
            while self.context.run(now):
                self.dispatched += 1
            return
        self._accept(now)
        while self.denoise.run(command.evaluations, now):
            self.dispatched += 1
            self._accept(now)  # whoever is done by then has left room

    def _accept(self, now: float) -> None:
        """Stage 1 takes offers, first come, first served, as long as it has room."""
        for ticket in list(self.offers):
            if not self._may_join(ticket):
                return
            try:
                if self.denoise.accept(ticket, now):
                    self.offers.remove(ticket)
                elif ticket.given is None:
                    return
                # One that comes from outside may lack the pages that those behind it hold: they go first.
            except Exception as error:  # a device may be full
                if self.denoise.lost:
                    self._events += self._begin_again(self.denoise, CallFailed([ticket], error), now)
                    return
                self._events += self._end(ticket, error, now)

    def _may_join(self, ticket: Ticket) -> bool:
        """Whether a request may be denoised beside those that are: who is under suspicion goes on alone."""
        others = [job.ticket for job in self.denoise.jobs]
        return not others or not (ticket.suspect or any(other.suspect for other in others))

    def _offer(self, now: float) -> list[Event]:
        """Finished contexts go to whoever asked for them: the next stage, or outside."""
        events: list[Event] = []
        while self.context.finished:
            ticket = self.context.finished.popleft()
            if not ticket.only_context:
                self.offers.append(ticket)
                events += self._told([_nothing_done(ticket)], now)
                continue
            try:
                outcome = ticket.lease.export()
            except Exception as error:
                outcome = error
            events += self._end(ticket, outcome, now)
        return events

    def _told(self, events: Sequence[Event], now: float) -> list[Event]:
        """A stage's events, as the engine gives them out; progress never goes back, though a request begins again."""
        given: list[Event] = []
        for event in events:
            ticket = self.tickets[event.request_id]
            if isinstance(event, Done):
                given += self._end(ticket, event.outcome, now)
                continue
            if isinstance(event, Progress):
                if event.done <= ticket.progress:
                    continue
                ticket.progress = event.done
            given.append(event)
        return given

    def _end(self, ticket: Ticket, outcome, now: float) -> list[Event]:
        """A request leaves."""
        ticket.enter("", now)
        self._forget(ticket)
        return [Done(ticket.request_id, outcome, tuple(ticket.spans))]

    def _forget(self, ticket: Ticket) -> None:
        """Takes a request out of the books and gives back all that it holds."""
        ticket.over = True
        del self.tickets[ticket.request_id]
        if ticket in self.offers:
            self.offers.remove(ticket)
        if ticket.context is not None:
            self.context.drop(ticket)
        self.context.store.blocks.forgo(ticket)
        self.denoise.drop(ticket)
        if ticket.lease is not None:
            ticket.lease.release()
            ticket.lease = None

    def _begin_again(self, stage: ContextStage | DenoiseStage, failure: CallFailed, now: float) -> list[Event]:
        """After a call that failed, in which the pages of its store were lost: whoever had some begins again.

        If several were in the call, they go on one by one, so that only whose fault it is fails.
        """
        self.dispatched += 1  # or a driver that sees nothing happen would wait for ever
        involved = [ticket for ticket in failure.tickets if not ticket.over]
        events: list[Event] = []
        if len(involved) == 1:
            events = self._end(involved[0], failure.error, now)
        else:
            for ticket in involved:
                ticket.suspect = True
        store = stage.store
        lost = [t for t in self.tickets.values() if t.lease is not None and t.lease.store is store]
        if store is self.denoise.store:
            lost += [t for t in self.tickets.values() if t.denoise is not None and t not in lost]
            self.denoise.reset()
        for ticket in lost:
            if ticket.lease is not None:
                ticket.lease.release()
            if ticket in self.offers:
                self.offers.remove(ticket)
            ticket.lease = ticket.denoise = None
            ticket.enter("wait", now)
        again = [ticket.context for ticket in lost if ticket.given is None]
        if store is self.context.store:
            self.context.calls.clear()
            self.context.scheduler.start_over(again)
        else:
            self.context.scheduler.wait_again(again)
        self.offers.extend(ticket for ticket in lost if ticket.given is not None)
        store.reset()
        return events


def _nothing_done(ticket: Ticket) -> Progress:
    """What is told of an image that can be begun: whoever watches would see nothing until the first call is done."""
    return Progress(0, ticket.prepared.request.settings.steps - 1, ticket.request_id)
