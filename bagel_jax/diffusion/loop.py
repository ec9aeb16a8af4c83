"""Stage 1: the jitted denoise loop."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bagel_jax.diffusion.guidance import Guidance, combine
from bagel_jax.diffusion.schedule import Schedule
from bagel_jax.handoff import ContextKV
from bagel_jax.models.bagel import BagelModel


class DenoiseState(NamedTuple):
    """Where a request stands."""

    latents: jax.Array  # [N, C p²] float32
    step: jax.Array  # evaluations done


class Canvas(NamedTuple):
    """What the block of noisy latents is made of besides the latents."""

    position_ids: jax.Array  # [N]
    markers: jax.Array  # [2] token ids


def guided_velocity(
    model: BagelModel, latents, timestep, guided, canvas: Canvas, context: ContextKV, g: Guidance
) -> jax.Array:
    """The velocity of one step, `[N, C p²]`. Branches that are off at this step are not computed.

    Args:
        model: the model.
        latents: `[N, C p²]`.
        timestep: in [0, 1].
        guided: whether the timestep is in the guidance interval.
        canvas: see `Canvas`.
        context: the branches' contexts.
        g: scales and renormalisation.
    """
    num_rows = len(context.rows)

    def rows(count):
        """Velocities of the first `count` rows, `[R, N, C p²]`, zeros for the others."""
        v = model.velocity(
            jnp.broadcast_to(latents, (count, *latents.shape)),
            jnp.broadcast_to(timestep, (count,)),
            canvas.position_ids,
            canvas.markers,
            context.rope[:count],
            context.prefix(count),
        )
        return jnp.pad(v, ((0, num_rows - count), (0, 0), (0, 0)))

    text_on = guided & (g.text_scale > 1)
    needed = jnp.where(text_on & (g.img_scale > 1), max(context.text_row, context.img_row), context.text_row)
    counts = sorted({1, context.text_row + 1, num_rows})
    which = jnp.searchsorted(jnp.asarray(counts), jnp.where(text_on, needed + 1, 1))
    v = jax.lax.switch(which, [partial(rows, count) for count in counts])
    return jnp.where(text_on, combine(v[0], v[context.text_row], v[context.img_row], g), v[0])


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("state",))
def denoise(
    graph, params, state: DenoiseState, stop, schedule: Schedule, canvas: Canvas, context: ContextKV, g: Guidance
) -> DenoiseState:
    """Runs a request up to evaluation number `stop`.

    Everything but array shapes and which branches are equal is traced: other steps, scales, shift, interval or
    noise run the same program.
    """
    model = nnx.merge(graph, params)

    def step(state):
        i = state.step
        v = guided_velocity(model, state.latents, schedule.timesteps[i], schedule.guided[i], canvas, context, g)
        return DenoiseState(state.latents - v * schedule.deltas[i], i + 1)

    return jax.lax.while_loop(lambda state: state.step < stop, step, state)


@partial(jax.jit, static_argnames=("graph", "grid"))
def decode_latents(graph, params, tokens, grid: tuple[int, int]) -> jax.Array:
    """Latent tokens `[N, C p²]` on a grid (rows, columns) -> pixels `[H, W, 3]`, about [-1, 1], not clipped."""
    model = nnx.merge(graph, params)
    return model.autoencoder.decode(model.unpatchify_latents(tokens, *grid)[None])[0]
