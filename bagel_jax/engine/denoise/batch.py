"""From works in progress to the arrays of a call, padded to few sizes.

A row of padding costs as much as any other, so numbers of rows are padded by a quarter at most, and not at all up to
4; latent tokens are padded by an eighth at most; the width of page tables is a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bagel_jax.buckets import bucket, power_of_two
from bagel_jax.config import BagelConfig
from bagel_jax.engine.denoise.jobs import Work
from bagel_jax.engine.denoise.steps import Batch, Rows
from bagel_jax.engine.handoff import VIEWS
from bagel_jax.inputs.prepare import latent_positions
from bagel_jax.request import MAX_STEPS, Settings
from bagel_jax.sampling.guidance import Guidance, guidance
from bagel_jax.sampling.taylorseer import Forecasts

_LEAST_TOKENS = 64
_LEAST_WIDTH = 4


def padded_tokens(works: Sequence[Work], config: BagelConfig) -> int:
    """N of a call; never more than the largest image has."""
    return min(bucket(max(work.tokens for work in works), _LEAST_TOKENS), config.max_latent_size**2)


def padded_rows(count: int) -> int:
    """R of a call with `count` rows: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
    if count <= 4:
        return count
    size = power_of_two(count)
    return 3 * size // 4 if count <= 3 * size // 4 else size


def batch_of(works: Sequence[Work], slots: int, count: int, config: BagelConfig, markers: np.ndarray) -> Batch:
    """What a call with N = `count` must know of the requests in its `slots` slots, some of which may be empty."""
    nobody = guidance(Settings())
    batch = Batch(
        active=np.zeros(slots, bool),
        step=np.zeros(slots, np.int32),
        timesteps=np.zeros((slots, MAX_STEPS), np.float32),
        deltas=np.zeros((slots, MAX_STEPS), np.float32),
        tokens=np.zeros(slots, np.int32),
        position_ids=np.zeros((slots, count), np.int32),
        text_on=np.zeros(slots, bool),
        text_view=np.zeros(slots, np.int32),
        img_view=np.zeros(slots, np.int32),
        guidance=Guidance(*(np.full(slots, value) for value in nobody)),
        markers=markers,
    )
    for work in works:
        i = work.slot
        batch.active[i], batch.step[i], batch.tokens[i] = True, work.done, work.tokens
        batch.timesteps[i], batch.deltas[i] = work.schedule.timesteps, work.schedule.deltas
        batch.position_ids[i, : work.tokens] = latent_positions(work.prepared.latent_grid, config)
        batch.text_on[i] = work.text_on
        _, batch.text_view[i], batch.img_view[i] = work.views
        for column, value in zip(batch.guidance, guidance(work.prepared.request.settings), strict=True):
            column[i] = value
    return batch


def rows_of(works: Sequence[Work], slots: int) -> Rows:
    """The views that the trunk computes in the next evaluation; there may be none."""
    wanted = [(work, view) for work in works for view in work.computed(work.views_on())]
    size = padded_rows(len(wanted))
    width = power_of_two(max((work.page_table.shape[1] for work, _ in wanted), default=1), _LEAST_WIDTH)
    rows = Rows(
        slot=np.full(size, slots, np.int32),
        view=np.zeros(size, np.int32),
        rope=np.zeros(size, np.int32),
        length=np.zeros(size, np.int32),
        page_table=np.zeros((size, width), np.int32),
    )
    for i, (work, view) in enumerate(wanted):
        table = work.page_table[view]
        rows.slot[i], rows.view[i], rows.rope[i], rows.length[i] = work.slot, view, work.rope[view], work.length[view]
        rows.page_table[i, : len(table)] = table
    return rows


def forecasts_of(works: Sequence[Work], slots: int) -> Forecasts | None:
    """What the next evaluation forecasts; None where no request uses TaylorSeer."""
    if all(work.courses is None for work in works):
        return None
    ahead = Forecasts(
        known=np.zeros((slots, VIEWS), np.int32),
        distance=np.zeros((slots, VIEWS), np.float32),
        forecast=np.zeros((slots, VIEWS), bool),
    )
    for work in works:
        for view in work.views_on() if work.courses is not None else ():
            course = work.courses[view]
            place = work.slot, view
            ahead.known[place], ahead.distance[place] = course.known, course.distance
            ahead.forecast[place] = not course.computes
    return ahead
