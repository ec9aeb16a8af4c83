"""Stage 1's jitted programs: the denoise loop over rows.

Rows are (request, branch) pairs, in one forward. What a row attends to lies in pages: its context, which is never
written to, and right behind it the keys and values of its own block, written anew by every layer of every step. So one
kernel reads both. Everything but array shapes is traced: other steps, scales, shifts, intervals, lengths or batch mates
run the same program.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bagel_jax.engine.kv.store import VIEWS
from bagel_jax.layout import NUM_MARKERS, block_kv_end
from bagel_jax.models.attention import KV
from bagel_jax.models.bagel import BagelModel
from bagel_jax.models.mot import Block
from bagel_jax.models.weights import Skeleton
from bagel_jax.pallas.paged_attention import pages as layout
from bagel_jax.pallas.paged_attention.api import paged_blocks
from bagel_jax.placement.spread import DATA, HEADS, ONE_DEVICE, PAGES, SEQUENCE, SPARE, Spec, Spread
from bagel_jax.sampling.guidance import Guidance, combine
from bagel_jax.sampling.taylorseer import Forecasts, expand, update

TERMS = None, None, None, SEQUENCE  # how `DenoiseState.terms` lie


class DenoiseProgram(NamedTuple):
    """What is static in a call."""

    skeleton: Skeleton
    backend: str  # of attention
    tokens: int  # N, latent tokens computed for every request of the batch
    spread: Spread = ONE_DEVICE


class DenoiseState(NamedTuple):
    """Where Q requests stand."""

    latents: jax.Array  # [Q, M, C p²] float32, M at least N
    pages: jax.Array  # [L, P, K, 2, page, E], keys and values of contexts and of blocks
    # [Q, V, order + 1, M', D] with TaylorSeer, the expansions of `taylorseer.py`, M' at least N; V views a request
    terms: jax.Array | None


class DenoiseBatch(NamedTuple):
    """What a call must know of each of Q requests."""

    active: jax.Array  # [Q] bool
    step: jax.Array  # [Q] int32, evaluations done before the call
    timesteps: jax.Array  # [Q, MAX_STEPS], see `schedule.Schedule`
    deltas: jax.Array  # [Q, MAX_STEPS]
    tokens: jax.Array  # [Q] int32, real latent tokens
    position_ids: jax.Array  # [Q, N] int32
    text_on: jax.Array  # [Q] bool, whether there is guidance during the call
    drop_text: jax.Array  # [Q] int32, the view of the branch without the last text
    drop_image: jax.Array  # [Q] int32, the view of the branch without images
    guidance: Guidance  # [Q] each
    markers: jax.Array  # [2] int32, token ids of a block's markers


class DenoiseRows(NamedTuple):
    """The R views that the trunk computes in every step of a call."""

    slot: jax.Array  # [R] int32, which request; Q: a row of padding
    view: jax.Array  # [R] int32, which of its views
    rope: jax.Array  # [R] int32
    length: jax.Array  # [R] int32, tokens of its context
    page_table: jax.Array  # [R, n] int32, of its context and of its own block behind it


def rows_hidden(
    model: BagelModel, static: DenoiseProgram, latents, step, pages, batch: DenoiseBatch, rows: DenoiseRows
):
    """The hidden states of all rows at their requests' steps `[Q]`, `[R, N, D]`, and the pages."""
    slot = jnp.minimum(rows.slot, batch.step.shape[0] - 1)
    number = jnp.arange(NUM_MARKERS + static.tokens)  # of the block's tokens, the markers first
    real = rows.slot == slot
    kv_end = jnp.where(real, block_kv_end(rows.length, batch.tokens[slot]), 0)
    place = rows.length[:, None] + number
    size = layout.page_size(pages)
    page = jnp.take_along_axis(rows.page_table, place // size, axis=1, mode="clip")
    page = jnp.where(place < kv_end[:, None], page, 0)  # page 0 is for what is nobody's

    cut, tokens = _cut(static.spread, rows.slot.shape[0])
    attend = _attention(static, rows.slot.shape[0])

    def attention(layer, q, k, v, pages):
        # Whole before they are joined: else XLA cuts the two markers as it does the latents.
        k, v = static.spread.lay((k, v), cut, None, HEADS)
        kv = KV(k.joined(1), v.joined(1))
        return attend(layer, q, kv, pages, page, place % size, rows.page_table, kv_end)

    x = static.spread.lay(latents[slot], cut, tokens)
    timestep = batch.timesteps[slot, step[slot]]
    return model.noised_hidden(x, timestep, batch.position_ids[slot], batch.markers, rows.rope, attention, pages)


def _attend(static: DenoiseProgram, layer, q: Block, kv: KV, pages, page, slot, page_table, kv_end):
    """Writes the keys and values of this device's rows, and attends from the queries that it has.

    Args:
        static: see `DenoiseProgram`.
        layer: its number.
        q: queries of the markers `[R, 2, H, E]` and of latents `[R, N, H, E]`; apart, since the latents are cut evenly.
        kv: of all tokens of the rows, `[R, 2 + N, K, E]`.
        pages: see `pages.py`.
        page, slot: `[R, 2 + N]` int32, where they go.
        page_table: `[R, n]` int32.
        kv_end: `[R]` int32.
    """
    flat = (x.reshape(-1, *x.shape[2:]) for x in (page, slot, kv.k, kv.v))
    pages = layout.write(pages, layer, *flat)
    out = paged_blocks(q.joined(1), pages, layer, page_table, kv_end, backend=static.backend)
    return q.split(out, 1), pages


def _cut(spread: Spread, num_rows: int) -> tuple[str | None, tuple[str, ...]]:
    """What cuts rows, and what cuts the latents of each: `data` too, where it does not cut the rows evenly.

    So three rows on two devices are half of each row's tokens on either, instead of two rows on one and one on the
    other; and the steps outside the guidance interval, of one row, do not leave a device idle.
    """
    rows = spread.even(num_rows, DATA)
    return rows, (SEQUENCE,) if rows else (DATA, SEQUENCE)


def _attention(static: DenoiseProgram, num_rows: int):
    """`_attend` with each device's own heads, rows and latents."""
    rows, latents = _cut(static.spread, num_rows)
    q = Block(Spec(rows, None, HEADS), Spec(rows, (*latents, SPARE), HEADS))
    by_row = Spec(rows)
    in_specs = Spec(), q, Spec(rows, None, HEADS), PAGES, by_row, by_row, by_row, by_row
    return static.spread.each(partial(_attend, static), in_specs, (q, PAGES))


def _guided(v, batch: DenoiseBatch):
    """Velocities `[Q, V, N, C p²]` of all views -> the guided ones `[Q, N, C p²]`."""
    number = jnp.arange(v.shape[0])
    main, text, img = v[:, 0], v[number, batch.drop_text], v[number, batch.drop_image]
    guided = jax.vmap(combine)(main, text, img, batch.guidance)
    return jnp.where(batch.text_on[:, None, None], guided, main)


def one_step(
    model: BagelModel,
    static: DenoiseProgram,
    state: DenoiseState,
    i,
    batch: DenoiseBatch,
    rows: DenoiseRows,
    ahead: Forecasts | None,
) -> tuple[jax.Array, DenoiseState]:
    """Evaluation number `i` of a call; returns the guided velocities `[Q, N, C p²]` and the state after it."""
    count, requests = static.tokens, state.latents.shape[0]
    latents, terms, pages, step = state.latents[:, :count], state.terms, state.pages, batch.step + i
    v = jnp.zeros((requests, VIEWS, *latents.shape[1:]))
    if rows.slot.shape[0]:
        hidden, pages = rows_hidden(model, static, latents, step, pages, batch, rows)
        v = v.at[rows.slot, rows.view].set(static.spread.lay(model.velocity(hidden)), mode="drop")
        if ahead is not None:
            cell = rows.slot, rows.view
            new = update(terms[*cell, :, :count], hidden, ahead.known[cell], ahead.distance[cell])
            terms = static.spread.lay(terms.at[*cell, :, :count].set(new, mode="drop"), *TERMS)
    if ahead is not None:
        forecast = model.velocity(expand(terms[:, :, :, :count], ahead.distance + i))
        v = jnp.where(ahead.forecast[..., None, None], forecast, v)
    real = jnp.arange(count) < batch.tokens[:, None]
    velocity = _guided(jnp.where(real[:, None, :, None], v, 0), batch)
    delta = jnp.where(batch.active, jnp.take_along_axis(batch.deltas, step[:, None], axis=1)[:, 0], 0)
    moved = jnp.where(batch.active[:, None, None], latents - velocity * delta[:, None, None], latents)
    return velocity, DenoiseState(state.latents.at[:, :count].set(moved), pages, terms)


@partial(jax.jit, static_argnames=("static",), donate_argnames=("state",))
def denoise(
    static: DenoiseProgram,
    arrays,
    state: DenoiseState,
    batch: DenoiseBatch,
    rows: DenoiseRows,
    ahead: Forecasts | None,
    steps,
) -> tuple[DenoiseState, jax.Array]:
    """Takes every active request `steps` evaluations further.

    Which rows are computed is the same in all of them; so with TaylorSeer (`ahead`) a computed step is a call of its
    own, while one call may hold several forecast steps.

    Returns:
        The state, and each request's number of evaluations `[Q]`, which is there when the call is done.
    """
    model = static.skeleton.merge(arrays)

    def step(i, state):
        return one_step(model, static, state, i, batch, rows, ahead)[1]

    latents, pages, terms = jax.lax.fori_loop(0, steps, step, state)
    latents, done = static.spread.lay((latents, batch.step + steps))
    terms = static.spread.lay(terms, *TERMS)
    return DenoiseState(latents, static.spread.lay(pages, *PAGES), terms), done


@partial(jax.jit, static_argnames=("spread",), donate_argnames=("latents",))
def join(latents, slot, noise, spread: Spread = ONE_DEVICE) -> jax.Array:
    """Latents `[Q, M, C p²]` with the noise `[M, C p²]` of one request more, in its slot."""
    return spread.lay(latents.at[slot].set(noise))


@partial(jax.jit, static_argnames=("spread",))
def leave(latents, slots, spread: Spread = ONE_DEVICE) -> jax.Array:
    """The latents of some requests, `[B, M, C p²]`: a copy, since what it is of is given to the next call."""
    return spread.lay(latents[slots])
