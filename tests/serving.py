"""Running stage 0 by hand: contexts of any segments, jobs in the middle of their work, logits of given tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from dense import view_of

from bagel_jax.engine.context import steps
from bagel_jax.engine.context.batch import decode_batch, page_table
from bagel_jax.engine.context.jobs import ContextJob
from bagel_jax.engine.context.stage import ContextStage
from bagel_jax.engine.handoff import ContextKV
from bagel_jax.engine.ticket import Done, Event, TextDelta, Ticket
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.layout import KVPlan, KVPrefix, Segment, SequencePlan, behind, place
from bagel_jax.models.attention import KV
from bagel_jax.pallas.paged_attention.pages import to_dense
from bagel_jax.request import Result

_CLOCK = itertools.count()  # time goes on with every call, so that tickets have spans
_NUMBERS = itertools.count()  # of tickets, in order of arrival


@dataclass(frozen=True)
class Served:
    """A request that has left stage 0, with its context where it makes an image."""

    ticket: Ticket
    context: ContextKV | None

    @property
    def ids(self) -> list[int] | None:
        """What was decoded."""
        return self.ticket.context.ids

    @property
    def result(self) -> Result:
        """What was counted, and the text."""
        return self.ticket.result

    @property
    def preempted(self) -> bool:
        """Whether it gave way to others."""
        return any(span.phase == "preempted" for span in self.ticket.spans)


def ticket_of(prepared: Prepared) -> Ticket:
    """A ticket as the engine makes it."""
    request = prepared.request
    result = Result(request.request_id, request.modality, notes=prepared.notes)
    return Ticket(next(_NUMBERS), prepared, None, False, 0.0, result)


def submit(stage: ContextStage, prepared: Prepared) -> Ticket:
    """Takes a request in."""
    ticket = ticket_of(prepared)
    stage.submit(ticket)
    return ticket


def cancel(stage: ContextStage, ticket: Ticket) -> None:
    """Drops a request as the engine does."""
    ticket.over = True
    stage.drop(ticket)
    if ticket.lease is not None:
        ticket.lease.release()
        ticket.lease = None


def step(stage: ContextStage) -> list[Event]:
    """One call, and what has come of it."""
    stage.run(next(_CLOCK))
    return [event for _ in range(len(stage.calls)) for event in stage.collect(next(_CLOCK))]


def turn(stage: ContextStage) -> list[Event]:
    """As many calls as may be in flight, and what has come of the oldest: what drivers do."""
    while stage.run(next(_CLOCK)):
        pass
    return stage.collect(next(_CLOCK))


def serve(stage: ContextStage, *prepared: Prepared) -> dict[str, Served | Exception]:
    """What becomes of requests that are in work together; text is heard of as it comes, and no other."""
    return finish(stage, *(submit(stage, one) for one in prepared))


def finish(stage: ContextStage, *tickets: Ticket) -> dict[str, Served | Exception]:
    """What becomes of requests that were submitted and of which nothing was heard yet."""
    heard: dict[str, list[TextDelta]] = defaultdict(list)
    gone: dict[str, Served | Exception] = {}
    mine = {ticket.request_id: ticket for ticket in tickets}
    while stage.busy:
        for event in turn(stage):
            assert event.request_id not in gone  # nothing is heard of who has left
            if isinstance(event, TextDelta):
                heard[event.request_id].append(event)
            elif isinstance(event.outcome, Exception):
                gone[event.request_id] = event.outcome
            else:
                assert isinstance(event, Done)
                ticket = mine[event.request_id]
                assert event.outcome is ticket.result
                gone[event.request_id] = Served(ticket, None)
        while stage.finished:
            ticket = stage.finished.popleft()
            context = ticket.lease.export()
            ticket.lease.release()
            ticket.lease = None
            gone[ticket.request_id] = Served(ticket, context)
    for key, one in gone.items():
        if isinstance(one, Served) and one.ids is not None:
            assert sum(event.tokens for event in heard[key]) == len(one.ids) - 1
            assert "".join(event.text for event in heard[key]) == one.result.text
    return gone


def prefilled(stage: ContextStage, prepared: Prepared) -> ContextJob:
    """The job of a request that is about to decode its first token."""
    submit(stage, prepared)
    while not any(job.decodes for job in stage.scheduler.running):
        step(stage)
    return stage.scheduler.running[-1]


def tokens_a_call(stage: ContextStage, most: int) -> None:
    """Has a stage decode fewer tokens a call than it could."""
    scheduler = stage.scheduler
    plan, follow = scheduler.plan, scheduler.follow
    scheduler.plan = lambda tokens, now: plan(min(tokens, most), now)
    scheduler.follow = lambda last, tokens: follow(last, min(tokens, most))


def with_segments(prepared: Prepared, segments: Sequence[Segment]) -> Prepared:
    """A request for an image whose one context is made of any segments."""
    placed = place(segments)
    view = KVPrefix(0, *behind(placed))
    request = dataclasses.replace(prepared.request, think=False)
    return dataclasses.replace(
        prepared, plan=KVPlan((SequencePlan(None, 0, placed),), view, view, view), request=request
    )


def context_of(stage: ContextStage, prepared: Prepared, segments: Sequence[Segment]) -> KV:
    """Keys and values of any segments, `[L, S, K, E]`, S their number of tokens."""
    made = with_segments(prepared, segments)
    (finished,) = serve(stage, made).values()
    assert finished.context.length.tolist() == [made.plan.cond.length]
    return view_of(finished.context)


@partial(jax.jit, static_argnames=("static",))
def _logits(static, arrays, pages, rows, table):
    return steps.advance(static.skeleton.merge(arrays), pages, rows, table, None, static)


def logits_of(stage: ContextStage, job: ContextJob, ids: Sequence[int]) -> np.ndarray:
    """Logits `[n, V]` of each step while a prefilled job is fed with `ids`, which become part of its context."""
    (sequence,), logits = job.sequences, []
    static, store = stage.program, stage.store
    assert stage.scheduler.grow(sequence, sequence.length + len(ids))
    for token in ids:
        sequence.tail[-1] = int(token)
        rows, _ = decode_batch([job], 1)
        table = page_table([job], 1, stage.table_width)
        out, store.pages = _logits(static, stage.weights.arrays, store.pages, rows, table)
        logits.append(np.asarray(out[0]))
        sequence.computed += 1
        sequence.tail.append(0)
    return np.stack(logits)


def cache_of(stage: ContextStage, job: ContextJob, length: int) -> KV:
    """The first tokens of a job's context, `[L, length, K, E]`."""
    cache = to_dense(stage.store.pages, np.asarray(job.sequences[0].pages))
    return KV(*(np.asarray(x[:, :length]) for x in cache))


def poison(stage: ContextStage) -> None:
    """NaN in all pages, which must make no difference."""
    store = stage.store
    store.pages = store.placement.put(jnp.full_like(store.pages, jnp.nan))
