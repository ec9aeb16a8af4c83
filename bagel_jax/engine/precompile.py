"""Compiling ahead of the first request: every program that requests of stated image sizes need, whoever meets whom.

Programs are run once each on nothing: no row, no token, all that is written goes to page 0, which is nobody's. What is
compiled lies in JAX's persistent cache, so that the next start reads it from there. Left out is TaylorSeer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np

from bagel_jax.buckets import bucket, grids, padded_grid, power_of_two
from bagel_jax.engine import nobody
from bagel_jax.engine.context import steps as context_steps
from bagel_jax.engine.context.scheduler import TEXT_BESIDE_IMAGE
from bagel_jax.engine.context.stage import ContextStage
from bagel_jax.engine.core import Engine
from bagel_jax.engine.denoise import decoder
from bagel_jax.engine.denoise import steps as denoise_steps
from bagel_jax.engine.denoise.batch import LEAST_WIDTH, padded_rows, padded_tokens
from bagel_jax.engine.denoise.stage import DenoiseStage
from bagel_jax.engine.kv.store import VIEWS, block_pages
from bagel_jax.inputs.images import resized_size
from bagel_jax.layout import NUM_MARKERS

_TEXT = 512  # tokens of a request's texts, up to which page tables are covered


def precompile(
    engine: Engine, sizes: str | tuple[tuple[int, int], ...], report: Callable[[int, int], None] = lambda *_: None
) -> int:
    """Compiles for images of some sizes, made, edited and asked about, and for texts.

    Args:
        engine: one that has nothing in work.
        sizes: heights and widths in pixels, or `all`.
        report: called with the number of programs that are done, and of all.

    Returns:
        The number of programs.
    """
    programs = [*_context_programs(engine.context, sizes), *_denoise_programs(engine, sizes)]
    report(0, len(programs))
    for i, program in enumerate(programs, 1):
        jax.block_until_ready(program())
        report(i, len(programs))
    return len(programs)


def _context_programs(stage: ContextStage, sizes) -> Iterator[Callable]:
    """Stage 0: texts, alone and beside rows that decode; rows alone; blocks of images, likewise."""
    c, store, most = stage.config, stage.store, stage.settings.ar_max_num_seqs
    static, arrays, model = stage.program, stage.weights.arrays, (stage.weights.skeleton, stage.weights.arrays)

    def chunk(size: int, image=None) -> context_steps.PrefillBatch:
        return nobody.prefilling(size, image, stage.table_width)

    def prefill(static, make: Callable[[], context_steps.PrefillBatch]) -> None:
        _, store.pages = context_steps.prefill(static, arrays, store.pages, make())

    def mixed(static, make: Callable[[], context_steps.PrefillBatch]) -> None:
        rows, table, sampling = nobody.decoding(most, stage.table_width)
        _, store.pages = context_steps.mixed(static, arrays, store.pages, rows, table, make(), sampling)

    def decode(count: int) -> None:
        rows, table, sampling = nobody.decoding(count, stage.table_width)
        numbers = np.int32(stage.end_token), np.int32(1)
        rows = store.placement.put(rows)
        _, _, store.pages = context_steps.decode(static, arrays, store.pages, rows, table, sampling, *numbers)

    def vit(count: int) -> jax.Array:
        return context_steps.embed_vit(*model, *nobody.patches(c, count), static.spread)

    def encoded(grid: tuple[int, int]) -> jax.Array:
        return context_steps.encode_image(*model, *nobody.image(c, grid), c.max_latent_size**2, static.spread)

    def vae(count: int, grid: tuple[int, int]) -> jax.Array:
        index, positions = np.full(count, -1, np.int32), np.zeros(count, np.int32)
        return context_steps.embed_vae(*model, encoded(grid), index, positions, static.spread)

    yield from (partial(decode, 1 << i) for i in range(power_of_two(most).bit_length()))
    longest = power_of_two(stage.settings.max_num_batched_tokens)
    for run in (prefill, mixed):
        yield from (partial(run, static, partial(chunk, 1 << i)) for i in range(4, longest.bit_length()))
    patches, tokens, padded = input_sizes(c, sizes)
    yield from (partial(encoded, grid) for grid in padded)
    for latents, embed, counts in ((False, vit, patches), (True, partial(vae, grid=padded[0]), tokens)):
        one = static._replace(latents=latents)
        for count in counts:
            for run in (prefill, mixed):
                yield partial(run, one, lambda embed=embed, count=count: chunk(TEXT_BESIDE_IMAGE, embed(count)))


def input_sizes(c, sizes) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Padded numbers of patches and of latent tokens, and padded grids, of images that are read."""
    unit = c.token_pixels
    if sizes == "all":
        counts = (
            sorted({bucket(n, 64) for n in range(1, side**2 + 1)}) for side in (c.max_vit_patches, c.max_latent_size)
        )
        return *counts, grids(c.max_latent_size, c.vae_transform.min_size // unit)
    patches, tokens, padded = set(), set(), set()
    for height, width in sizes:
        read = resized_size(width, height, c.vae_transform)
        across, down = resized_size(*read, c.vit_transform)
        patches.add(bucket((across // c.vit.patch_size) * (down // c.vit.patch_size), 64))
        rows, columns = (side // unit for side in reversed(resized_size(*read, c.vae_transform)))
        tokens.add(bucket(rows * columns, 64))
        padded.add(padded_grid(rows, columns, c.max_latent_size))
    return sorted(patches), sorted(tokens), sorted(padded)


def _denoise_programs(engine: Engine, sizes) -> Iterator[Callable]:
    """Stage 1: contexts that come and go, evaluations of all numbers of rows, images of all grids."""
    stage, store = engine.denoise, engine.denoise.store
    c, slots = stage.config, stage.settings.dit_max_num_seqs
    made = _made_grids(c, sizes)
    widths, counts = set(), set()
    for rows, columns in made:
        inside = rows * columns
        counts.add(padded_tokens(inside, c, stage.spread))
        blocks = block_pages(inside, store.page_size)
        most = _TEXT + inside + c.max_vit_patches**2 + 2 * NUM_MARKERS
        first, last = (power_of_two(store.count(length) + blocks, LEAST_WIDTH) for length in (0, most))
        widths |= {first << i for i in range((last // first).bit_length())}
    numbers = sorted({padded_rows(n) for n in range(1, slots * VIEWS + 1)})
    if store is not engine.context.store:
        largest = store.count(_TEXT + c.max_latent_size**2 + c.max_vit_patches**2 + 2 * NUM_MARKERS)
        yield from (partial(_move, engine, 1 << i) for i in range(power_of_two(largest).bit_length()))
    yield partial(_join, stage)
    yield from (partial(_evaluate, stage, n, r, w) for n in sorted(counts) for r in numbers for w in sorted(widths))
    limit = c.max_latent_size
    for grid in sorted({padded_grid(*grid, limit) for grid in made}):
        together = [1 << i for i in range(decoder.MAX_IMAGES.bit_length()) if 1 << i <= slots]
        yield from (partial(_draw, stage, count, grid) for count in together)


def _made_grids(c, sizes) -> list[tuple[int, int]]:
    if sizes == "all":
        return grids(c.max_latent_size)
    grid = {(height // c.token_pixels, width // c.token_pixels) for height, width in sizes}
    read = (resized_size(width, height, c.vae_transform) for height, width in sizes)
    return sorted(grid | {(down // c.token_pixels, across // c.token_pixels) for across, down in read})


def _move(engine: Engine, count: int) -> None:
    store = engine.denoise.store
    store.put([0] * count, jax.device_put(engine.context.store.take([0] * count), store.placement.pages()))


def _join(stage: DenoiseStage) -> None:
    noise = np.zeros(stage.latents.shape[1:], np.float32)
    stage.latents = denoise_steps.join(stage.latents, np.int32(0), noise, spread=stage.spread)


def _evaluate(stage: DenoiseStage, count: int, rows: int, width: int) -> None:
    slots, store = len(stage.slots), stage.store
    batch, nobodies = nobody.denoising(stage.config, slots, count, rows, width, stage.markers)
    static = denoise_steps.DenoiseProgram(stage.weights.skeleton, stage.backend, count, stage.spread)
    state = denoise_steps.DenoiseState(stage.latents, store.pages, None)
    state, _ = denoise_steps.denoise(static, stage.weights.arrays, state, batch, nobodies, None, np.int32(0))
    stage.latents, store.pages = state.latents, state.pages


def _draw(stage: DenoiseStage, count: int, grid: tuple[int, int]) -> jax.Array:
    latents = denoise_steps.leave(stage.latents, np.zeros(count, np.int32), spread=stage.spread)
    return decoder.start(stage.weights, latents, [grid] * count, grid, stage.spread)
