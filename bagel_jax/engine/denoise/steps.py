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

from bagel_jax.engine.handoff import VIEWS
from bagel_jax.models.bagel import BagelModel
from bagel_jax.models.weights import Skeleton
from bagel_jax.pallas.paged_attention import pages as layout
from bagel_jax.pallas.paged_attention.api import paged_blocks
from bagel_jax.sampling.guidance import Guidance, combine
from bagel_jax.sampling.taylorseer import Forecasts, expand, update


class Program(NamedTuple):
    """What is static in a call."""

    skeleton: Skeleton
    backend: str  # of attention
    tokens: int  # N, latent tokens computed for every request of the batch


class DenoiseState(NamedTuple):
    """Where Q requests stand."""

    latents: jax.Array  # [Q, M, C p²] float32, M at least N
    pages: jax.Array  # [L, P, K, 2, page, E], keys and values of contexts and of blocks
    # [Q, V, order + 1, M', D] with TaylorSeer, the expansions of `taylorseer.py`, M' at least N; V views a request
    terms: jax.Array | None


class Batch(NamedTuple):
    """What a call must know of each of Q requests."""

    active: jax.Array  # [Q] bool
    step: jax.Array  # [Q] int32, evaluations done before the call
    timesteps: jax.Array  # [Q, MAX_STEPS], see `schedule.Schedule`
    deltas: jax.Array  # [Q, MAX_STEPS]
    tokens: jax.Array  # [Q] int32, real latent tokens
    position_ids: jax.Array  # [Q, N] int32
    text_on: jax.Array  # [Q] bool, whether there is guidance during the call
    text_view: jax.Array  # [Q] int32, the view of the branch without the last text
    img_view: jax.Array  # [Q] int32, the view of the branch without images
    guidance: Guidance  # [Q] each
    markers: jax.Array  # [2] int32, token ids of a block's markers


class Rows(NamedTuple):
    """The R views that the trunk computes in every step of a call."""

    slot: jax.Array  # [R] int32, which request; Q: a row of padding
    view: jax.Array  # [R] int32, which of its views
    rope: jax.Array  # [R] int32
    length: jax.Array  # [R] int32, tokens of its context
    page_table: jax.Array  # [R, n] int32, of its context and of its own block behind it


def rows_hidden(model: BagelModel, static: Program, latents, step, pages, batch: Batch, rows: Rows):
    """The hidden states of all rows at their requests' steps `[Q]`, `[R, N, D]`, and the pages."""
    slot = jnp.minimum(rows.slot, batch.step.shape[0] - 1)
    number = jnp.arange(2 + static.tokens)
    own = jnp.where(rows.slot == slot, 2 + batch.tokens[slot], 0)  # tokens of the row's block
    place = rows.length[:, None] + number
    page = jnp.take_along_axis(rows.page_table, place // layout.page_size(pages), axis=1, mode="clip")
    page = jnp.where(number < own[:, None], page, 0).reshape(-1)  # page 0 is for what is nobody's
    where = page, (place % layout.page_size(pages)).reshape(-1)
    kv_end = jnp.where(own > 0, rows.length + own, 0)

    def attention(layer, q, kv, pages):
        pages = layout.write(pages, layer, *where, *(x.reshape(-1, *x.shape[2:]) for x in kv))
        return paged_blocks(q, pages, layer, rows.page_table, kv_end, backend=static.backend), pages

    about = batch.timesteps[slot, step[slot]], batch.position_ids[slot], batch.markers, rows.rope
    return model.noised_hidden(latents[slot], *about, attention, pages)


def _guided(v, batch: Batch):
    """Velocities `[Q, V, N, C p²]` of all views -> the guided ones `[Q, N, C p²]`."""
    number = jnp.arange(v.shape[0])
    main, text, img = v[:, 0], v[number, batch.text_view], v[number, batch.img_view]
    guided = jax.vmap(combine)(main, text, img, batch.guidance)
    return jnp.where(batch.text_on[:, None, None], guided, main)


def one_step(
    model: BagelModel, static: Program, state: DenoiseState, i, batch: Batch, rows: Rows, ahead: Forecasts | None
) -> tuple[jax.Array, DenoiseState]:
    """Evaluation number `i` of a call; returns the guided velocities `[Q, N, C p²]` and the state after it."""
    count, requests = static.tokens, state.latents.shape[0]
    latents, terms, pages, step = state.latents[:, :count], state.terms, state.pages, batch.step + i
    v = jnp.zeros((requests, VIEWS, *latents.shape[1:]))
    if rows.slot.shape[0]:
        hidden, pages = rows_hidden(model, static, latents, step, pages, batch, rows)
        v = v.at[rows.slot, rows.view].set(model.velocity(hidden), mode="drop")
        if ahead is not None:
            mine = rows.slot, rows.view
            new = update(terms[*mine, :, :count], hidden, ahead.known[mine], ahead.distance[mine])
            terms = terms.at[*mine, :, :count].set(new, mode="drop")
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
    static: Program, arrays, state: DenoiseState, batch: Batch, rows: Rows, ahead: Forecasts | None, steps
) -> DenoiseState:
    """Takes every active request `steps` evaluations further.

    Which rows are computed is the same in all of them; so with TaylorSeer (`ahead`) a computed step is a call of its
    own, while one call may hold several forecast steps.
    """
    model = static.skeleton.merge(arrays)

    def step(i, state):
        return one_step(model, static, state, i, batch, rows, ahead)[1]

    return jax.lax.fori_loop(0, steps, step, state)


@partial(jax.jit, donate_argnames=("state",))
def join(state: DenoiseState, slot, noise, numbers, pages, source, target) -> DenoiseState:
    """The state with one request more.

    Args:
        state: the state.
        slot: where the request's latents go.
        noise: `[M, C p²]`, with which it begins.
        numbers: `[n]` int32, pages that the context's `pages` `[L, n, K, 2, page, E]` become; 0: padding.
        pages: see `numbers`.
        source, target: `[V]` int32, pages that are copied after that: each view's block begins in a copy of the page
            with which its context ends.
    """
    mine = layout.copy_pages(layout.put_pages(state.pages, numbers, pages), source, target)
    return state._replace(latents=state.latents.at[slot].set(noise), pages=mine)
