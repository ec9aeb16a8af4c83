"""What stage 1 knows of a request: which of its views the next steps need, and how far it is. On the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from bagel_jax.engine.handoff import Lease
from bagel_jax.engine.kv.store import VIEWS
from bagel_jax.engine.ticket import Ticket
from bagel_jax.sampling.guidance import branches_on
from bagel_jax.sampling.schedule import Schedule, schedule
from bagel_jax.sampling.taylorseer import TaylorState


@dataclass(eq=False)
class DenoiseJob:
    """A request in stage 1."""

    ticket: Ticket
    schedule: Schedule
    lease: Lease
    views: tuple[int, int, int]  # the view of each branch
    length: np.ndarray  # [V]
    rope: np.ndarray  # [V]
    view_pages: list[list[int]]  # of each view's context
    slot: int = 0
    blocks: list[int] = field(default_factory=list)  # pages, each view's in turn
    page_table: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))  # [V, m], contexts and blocks
    taylor: list[TaylorState] | None = None  # of each view, with TaylorSeer
    done: int = 0  # evaluations that were dispatched

    @classmethod
    def create(cls, ticket: Ticket, lease: Lease) -> DenoiseJob:
        """The job of a request that has not begun."""
        s, seen = ticket.prepared.request.settings, lease.views
        times = schedule(s.steps, s.timestep_shift, s.cfg_interval)
        views = 0, seen.drop_text, seen.drop_image
        length, rope, pages = seen.length, seen.rope, lease.view_pages
        if s.taylorseer and not times.guided[0]:
            # Branches that begin later are forecast at other steps than the first, even if they see the same.
            length, rope, pages = length[list(views)], rope[list(views)], [pages[view] for view in views]
            views = 0, 1, 2
        job = cls(ticket, times, lease, views, length, rope, pages)
        if s.taylorseer:
            settings = s.taylorseer_interval, s.taylorseer_order, s.taylorseer_first
            job.taylor = [TaylorState(*settings) for _ in range(VIEWS)]
        return job

    @property
    def total(self) -> int:
        """Evaluations in all."""
        return self.ticket.prepared.request.settings.steps - 1

    @property
    def tokens(self) -> int:
        """Latent tokens, N."""
        return len(self.ticket.prepared.initial_latent)

    @property
    def text_on(self) -> bool:
        """Whether the next evaluation is guided."""
        return self._on(self.done)[0]

    def views_on(self, step: int | None = None) -> tuple[int, ...]:
        """The views that an evaluation needs, the next one if no other is named."""
        text, img = self._on(self.done if step is None else step)
        on = (True, text, img)
        return tuple(dict.fromkeys(view for view, needed in zip(self.views, on, strict=True) if needed))

    def computed(self, views: Iterable[int]) -> tuple[int, ...]:
        """Those of the views that the next evaluation computes; the others are forecast."""
        return tuple(view for view in views if self.taylor is None or self.taylor[view].computes)

    def steps_alike(self) -> int:
        """How many of the next evaluations compute the same views."""
        views, limit = self.views_on(), self.total - self.done
        if self.taylor is not None:
            if self.computed(views):
                return 1
            limit = min(limit, *(self.taylor[view].steps_ahead for view in views))
        alike = 1
        while alike < limit and self.views_on(self.done + alike) == views:
            alike += 1
        return alike

    def take(self, count: int) -> None:
        """Notes that `count` evaluations alike were done."""
        for view in self.views_on() if self.taylor is not None else ():
            self.taylor[view].take(count)
        self.done += count

    def _on(self, step: int) -> tuple[bool, bool]:
        return branches_on(self.ticket.prepared.request.settings, self.schedule.guided[step])
