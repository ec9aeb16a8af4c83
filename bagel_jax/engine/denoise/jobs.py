"""What stage 1 knows of a request: which of its views the next steps need, and how far it is. On the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from bagel_jax.clock import Span
from bagel_jax.engine.handoff import VIEWS, ContextKV
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.sampling.guidance import branches_on
from bagel_jax.sampling.schedule import Schedule, schedule
from bagel_jax.sampling.taylorseer import Course


@dataclass(eq=False)
class Work:
    """A request in stage 1."""

    prepared: Prepared
    schedule: Schedule
    views: tuple[int, int, int]  # the view of each branch
    length: np.ndarray  # [V]
    rope: np.ndarray  # [V]
    context: ContextKV
    page_table: np.ndarray | None = None  # [V, m], pages of the stage's pool, of each view's context and block
    courses: list[Course] | None = None  # of each view, with TaylorSeer
    slot: int = 0
    pages: list[int] = field(default_factory=list)
    done: int = 0  # evaluations
    spans: list[Span] = field(default_factory=list)

    @classmethod
    def create(cls, prepared: Prepared, context: ContextKV) -> Work:
        """The work of a request that has not begun."""
        s = prepared.request.settings
        times = schedule(s.steps, s.timestep_shift, s.cfg_interval)
        views = 0, context.text_view, context.img_view
        if s.taylorseer and not times.guided[0]:
            # Branches that begin later are forecast at other steps than the first, even if they see the same.
            length, rope, page_table = (
                np.asarray(x)[list(views)] for x in (context.length, context.rope, context.page_table)
            )
            context = dataclasses.replace(context, length=length, rope=rope, page_table=page_table)
            views = 0, 1, 2
        length, rope = np.asarray(context.length), np.asarray(context.rope)
        work = cls(prepared, times, views, length, rope, context)
        work.restart()
        return work

    def restart(self) -> None:
        """Nothing is done yet."""
        s = self.prepared.request.settings
        how = s.taylorseer_interval, s.taylorseer_order, s.taylorseer_first
        self.done, self.courses = 0, [Course(*how) for _ in range(VIEWS)] if s.taylorseer else None

    @property
    def request_id(self) -> str:
        """The request's."""
        return self.prepared.request.request_id

    @property
    def total(self) -> int:
        """Evaluations in all."""
        return self.prepared.request.settings.steps - 1

    @property
    def tokens(self) -> int:
        """Latent tokens, N."""
        return len(self.prepared.initial_latent)

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
        return tuple(view for view in views if self.courses is None or self.courses[view].computes)

    def steps_alike(self) -> int:
        """How many of the next evaluations compute the same views."""
        views, limit = self.views_on(), self.total - self.done
        if self.courses is not None:
            if self.computed(views):
                return 1
            limit = min(limit, *(self.courses[view].steps_ahead for view in views))
        alike = 1
        while alike < limit and self.views_on(self.done + alike) == views:
            alike += 1
        return alike

    def take(self, count: int) -> None:
        """Notes that `count` evaluations alike were done."""
        for view in self.views_on() if self.courses is not None else ():
            self.courses[view].take(count)
        self.done += count

    def _on(self, step: int) -> tuple[bool, bool]:
        return branches_on(self.prepared.request.settings, self.schedule.guided[step])
