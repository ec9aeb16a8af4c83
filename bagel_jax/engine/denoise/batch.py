"""From requests in work to the arrays of a call, padded to few sizes.

A row of padding costs as much as any other, so numbers of rows are padded by a quarter at most, and not at all up to
4; latent tokens are padded by an eighth at most; the width of page tables is a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bagel_jax.buckets import bucket, power_of_two
from bagel_jax.config import BagelConfig
from bagel_jax.engine.denoise.jobs import DenoiseJob
from bagel_jax.engine.denoise.steps import DenoiseBatch, DenoiseRows
from bagel_jax.engine.kv.store import VIEWS
from bagel_jax.inputs.prepare import latent_positions
from bagel_jax.placement.spread import QUERIES, Spread
from bagel_jax.request import MAX_STEPS, Settings
from bagel_jax.sampling.guidance import Guidance, guidance
from bagel_jax.sampling.taylorseer import Forecasts

_LEAST_TOKENS = 64
LEAST_WIDTH = 4


def padded_tokens(tokens: int, config: BagelConfig, spread: Spread) -> int:
    """N of a call for images of so many tokens; not more than the largest image has, but for what a mesh needs."""
    return spread.padded(min(bucket(tokens, _LEAST_TOKENS), config.max_latent_size**2), QUERIES)


def padded_rows(count: int) -> int:
    """R of a call with `count` rows: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on."""
    if count <= 4:
        return count
    size = power_of_two(count)
    return 3 * size // 4 if count <= 3 * size // 4 else size


def denoise_batch(
    jobs: Sequence[DenoiseJob], slots: int, count: int, config: BagelConfig, markers: np.ndarray
) -> DenoiseBatch:
    """What a call with N = `count` must know of the requests in its `slots` slots, some of which may be empty."""
    nobody = guidance(Settings())
    batch = DenoiseBatch(
        active=np.zeros(slots, bool),
        step=np.zeros(slots, np.int32),
        timesteps=np.zeros((slots, MAX_STEPS), np.float32),
        deltas=np.zeros((slots, MAX_STEPS), np.float32),
        tokens=np.zeros(slots, np.int32),
        position_ids=np.zeros((slots, count), np.int32),
        text_on=np.zeros(slots, bool),
        drop_text=np.zeros(slots, np.int32),
        drop_image=np.zeros(slots, np.int32),
        guidance=Guidance(*(np.full(slots, value) for value in nobody)),
        markers=markers,
    )
    for job in jobs:
        i = job.slot
        batch.active[i], batch.step[i], batch.tokens[i] = True, job.done, job.tokens
        batch.timesteps[i], batch.deltas[i] = job.schedule.timesteps, job.schedule.deltas
        batch.position_ids[i, : job.tokens] = latent_positions(job.ticket.prepared.latent_grid, config)
        batch.text_on[i] = job.text_on
        _, batch.drop_text[i], batch.drop_image[i] = job.views
        for column, value in zip(batch.guidance, guidance(job.ticket.prepared.request.settings), strict=True):
            column[i] = value
    return batch


def denoise_rows(jobs: Sequence[DenoiseJob], slots: int) -> DenoiseRows:
    """The views that the trunk computes in the next evaluation; there may be none."""
    wanted = [(job, view) for job in jobs for view in job.computed(job.views_on())]
    size = padded_rows(len(wanted))
    width = power_of_two(max((job.page_table.shape[1] for job, _ in wanted), default=1), LEAST_WIDTH)
    rows = DenoiseRows(
        slot=np.full(size, slots, np.int32),
        view=np.zeros(size, np.int32),
        rope=np.zeros(size, np.int32),
        length=np.zeros(size, np.int32),
        page_table=np.zeros((size, width), np.int32),
    )
    for i, (job, view) in enumerate(wanted):
        table = job.page_table[view]
        rows.slot[i], rows.view[i], rows.rope[i], rows.length[i] = job.slot, view, job.rope[view], job.length[view]
        rows.page_table[i, : len(table)] = table
    return rows


def forecasts_of(jobs: Sequence[DenoiseJob], slots: int) -> Forecasts | None:
    """What the next evaluation forecasts; None where no request uses TaylorSeer."""
    if all(job.taylor is None for job in jobs):
        return None
    ahead = Forecasts(
        known=np.zeros((slots, VIEWS), np.int32),
        distance=np.zeros((slots, VIEWS), np.float32),
        forecast=np.zeros((slots, VIEWS), bool),
    )
    for job in jobs:
        for view in job.views_on() if job.taylor is not None else ():
            state = job.taylor[view]
            place = job.slot, view
            ahead.known[place], ahead.distance[place] = state.known, state.distance
            ahead.forecast[place] = not state.computes
    return ahead
