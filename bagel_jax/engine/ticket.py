"""What the engine knows of a request in work, which both stages extend; and all that goes in and comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from bagel_jax.engine.handoff import ContextKV, Lease
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.request import Result

if TYPE_CHECKING:
    from bagel_jax.engine.context.jobs import ContextJob
    from bagel_jax.engine.denoise.jobs import DenoiseJob

CONTEXT, DENOISE = "context", "denoise"
STAGES = (CONTEXT, DENOISE)


@dataclass(frozen=True)
class Submit:
    """Takes a request in, under an id that no other one in work has.

    Args:
        prepared: the request.
        given: its context, computed elsewhere: stage 0 is left out.
        only_context: end with the request's `ContextKV` instead of a result.
    """

    prepared: Prepared
    given: ContextKV | None = None
    only_context: bool = False


@dataclass(frozen=True)
class Cancel:
    """Drops a request, of which nothing more is heard."""

    request_id: str


@dataclass(frozen=True)
class Run:
    """Dispatches what a stage can do before the results of its calls in flight are read.

    Args:
        stage: one of `STAGES`.
        evaluations: how many evaluations a call of stage 1 takes at most; None: as many as need the same rows.
    """

    stage: str
    evaluations: int | None = None


@dataclass(frozen=True)
class Collect:
    """Reads the results of a stage's oldest call in flight, waiting for it if need be."""

    stage: str


Command = Submit | Cancel | Run | Collect


@dataclass(frozen=True)
class TextDelta:
    """Text that was decoded since the last one; all of them together are the answer."""

    text: str
    tokens: int  # how many tokens it took
    request_id: str = ""


@dataclass(frozen=True)
class Progress:
    """How far an image is: evaluations of the model."""

    done: int
    total: int
    request_id: str = ""


class Span(NamedTuple):
    """A stretch of time that a request spent in a phase, in seconds of whatever clock the engine was given."""

    phase: str
    started: float
    ended: float


@dataclass(frozen=True)
class Done:
    """A request has left the engine, with a result, the context that was asked for, or the reason why not."""

    request_id: str
    outcome: Result | ContextKV | Exception
    spans: tuple[Span, ...] = ()


Event = TextDelta | Progress | Done


@dataclass(eq=False)
class Ticket:
    """A request in work. Times are what the engine was told; nothing is decided by them."""

    number: int  # in order of arrival
    prepared: Prepared
    given: ContextKV | None
    only_context: bool
    submitted: float
    result: Result
    blocks: int = 0  # pages of stage 0's store that its image will be denoised in
    context: ContextJob | None = None  # in stage 0; stays, so that the context can be computed again
    lease: Lease | None = None  # the finished context, until stage 1 has taken it over
    denoise: DenoiseJob | None = None  # in stage 1
    suspect: bool = False  # was in a call that failed, so it goes on alone
    over: bool = False  # it has left
    progress: int = -1  # evaluations that were told of
    said: str = ""  # the text that was told
    untold: list[int] = field(default_factory=list)  # tokens whose text was not told yet
    spans: list[Span] = field(default_factory=list)
    _phase: str = ""
    _since: float = 0.0

    @property
    def request_id(self) -> str:
        """The request's."""
        return self.prepared.request.request_id

    def enter(self, phase: str, now: float) -> None:
        """Notes that a phase begins now, with which the one before ends; "" is none."""
        if self._phase and now > self._since:
            self.spans.append(Span(self._phase, self._since, now))
        self._phase, self._since = phase, now
