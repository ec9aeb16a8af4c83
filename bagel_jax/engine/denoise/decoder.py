"""Images from latents: several at once, or in tiles where an image is large.

In one piece the decoder of a 1024² image holds gigabytes. In tiles it holds those of one tile, but the decoder's
norms and its attention then see a tile instead of the image, so that colours may shift a little from tile to tile.
Tiles overlap, and are blended there.

Programs are compiled for padded grids, not for each size of an image, and for few numbers of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.buckets import padded_grid
from bagel_jax.engine.convolutions import convolution_program
from bagel_jax.errors import InputError
from bagel_jax.models.weights import Weights
from bagel_jax.placement.spread import IMAGE_ROWS, ONE_DEVICE, Spread

# In latent tokens: a tile's side (512 pixels in the published model), and how far tiles overlap.
TILE, OVERLAP = 32, 8
# Images decoded at once, at most; a power of two. More only take more memory.
MAX_IMAGES = 4


@convolution_program("skeleton", "spread")
def decode_latents(skeleton, arrays, tokens, size, spread: Spread = ONE_DEVICE) -> jax.Array:
    """Latent tokens `[B, rows, columns, C p²]` -> pixels `[B, H, W, 3]`, about [-1, 1], not clipped.

    `size`: `[B, 2]` int32, rows and columns of each image's own tokens; the other ones are padding, whatever they hold,
    and their pixels rubbish.
    """
    model = skeleton.merge(arrays)
    rows, columns = tokens.shape[1:3]
    latents = jax.vmap(lambda x: model.unpatchify_latents(x, rows, columns))(tokens)
    latents = spread.lay(latents, None, IMAGE_ROWS)
    return spread.lay(model.autoencoder.decode(latents, size * model.config.latent_patch_size))


@partial(jax.jit, static_argnames=("spread",))
def _on_grid(spread: Spread, tokens, index) -> jax.Array:
    """Tokens `[B, M, C p²]` on a grid: `index` `[B, rows, columns]` says which of its M each place of an image has."""
    cells = jnp.take_along_axis(tokens, index.reshape(len(index), -1, 1), axis=1)
    return spread.lay(cells.reshape(*index.shape, -1))


def start(
    weights: Weights,
    tokens: jax.Array,
    grids: Sequence[tuple[int, int]],
    padded: tuple[int, int],
    spread: Spread = ONE_DEVICE,
) -> jax.Array:
    """Starts to decode images of one padded grid, without waiting; `cropped` gives the images.

    Args:
        weights: the model.
        tokens: `[B, M, C p²]`, each image's latent tokens and behind them anything.
        grids: each image's rows and columns.
        padded: their padded grid.
        spread: the mesh that the weights are on.

    Returns:
        `[B, H, W, 3]`, with rubbish behind each image.
    """
    index = np.zeros((len(grids), *padded), np.int32)
    for places, (rows, columns) in zip(index, grids, strict=True):
        places[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    cells, size = _on_grid(spread, tokens, index), np.asarray(grids, np.int32)
    return decode_latents(weights.skeleton, weights.arrays, cells, size, spread=spread)


def cropped(pixels: np.ndarray, grids: Sequence[tuple[int, int]], unit: int) -> list[np.ndarray]:
    """Each image of `[B, H, W, 3]`, of which a latent token is `unit` pixels wide."""
    # Copies: a view would keep the pixels of the whole group in memory.
    return [image[: rows * unit, : columns * unit].copy() for image, (rows, columns) in zip(pixels, grids, strict=True)]


def decode(
    weights: Weights,
    tokens: Sequence[np.ndarray],
    grids: Sequence[tuple[int, int]],
    limit: int,
    *,
    tiled: bool = False,
    spread: Spread = ONE_DEVICE,
) -> list[np.ndarray]:
    """Images from their latents, in tiles where a grid is larger than one and `tiled` is set.

    Source of the tiling: `tiled_decode` in diffusers' `AutoencoderKL`.

    Args:
        weights: the model.
        tokens: each image's latent tokens `[N, C p²]`.
        grids: each image's rows and columns; best of one padded grid (`buckets.padded_grid`), for all are padded alike.
        limit: the longest side of a grid that the model has.
        tiled: see above.
        spread: the mesh that the weights are on.

    Returns:
        Each image's pixels `[H, W, 3]` float32, about [-1, 1], not clipped.

    Raises:
        InputError: tokens do not fill their grid, or a side of a grid is above the limit.
    """
    for one, grid in zip(tokens, grids, strict=True):
        padded_grid(*grid, limit)  # refuses what no model has
        if len(one) != grid[0] * grid[1]:
            raise InputError(f"an image of {grid[0]} x {grid[1]} latent tokens has {len(one)}; it must have as many")
    if tiled and max(map(max, grids)) > TILE:
        return [_in_tiles(weights, one, grid, limit, spread) for one, grid in zip(tokens, grids, strict=True)]
    cells = [one.reshape(*grid, -1) for one, grid in zip(tokens, grids, strict=True)]
    return [image for group in groups(cells) for image in _at_once(weights, group, limit, spread)]


def groups(images: Sequence) -> Iterator[Sequence]:
    """So many at once as programs are compiled for: powers of two, so that none need be filled up."""
    start = 0
    while start < len(images):
        count = min(MAX_IMAGES, 1 << ((len(images) - start).bit_length() - 1))
        yield images[start : start + count]
        start += count


def _at_once(weights: Weights, cells: Sequence[np.ndarray], limit: int, spread: Spread) -> list[np.ndarray]:
    """Images of tokens `[rows, columns, C p²]` by one call."""
    size = np.asarray([x.shape[:2] for x in cells], np.int32)
    padded = padded_grid(*map(int, size.max(axis=0)), limit)
    tokens = np.zeros((len(cells), *padded, cells[0].shape[-1]), np.float32)
    for i, x in enumerate(cells):
        tokens[i, : x.shape[0], : x.shape[1]] = x
    pixels = np.asarray(decode_latents(weights.skeleton, weights.arrays, tokens, size, spread=spread), np.float32)
    unit = pixels.shape[1] // padded[0]
    return cropped(pixels, size, unit)


def _in_tiles(weights: Weights, tokens: np.ndarray, grid: tuple[int, int], limit: int, spread: Spread) -> np.ndarray:
    """An image `[H, W, 3]`, of which one tile at a time is decoded."""
    rows, columns = grid
    cells = tokens.reshape(rows, columns, -1)
    size = min(TILE, rows), min(TILE, columns)
    total, weight = None, None
    for top in starts(rows):
        for left in starts(columns):
            (pixels,) = _at_once(weights, [cells[top : top + size[0], left : left + size[1]]], limit, spread)
            unit = pixels.shape[0] // size[0]
            if total is None:
                total = np.zeros((rows * unit, columns * unit, pixels.shape[-1]), np.float32)
                weight = np.zeros((rows * unit, columns * unit, 1), np.float32)
            share = (
                _ramp(size[0] * unit, OVERLAP * unit, top > 0, top + size[0] < rows)[:, None, None]
                * _ramp(size[1] * unit, OVERLAP * unit, left > 0, left + size[1] < columns)[:, None]
            )
            place = np.s_[top * unit : (top + size[0]) * unit, left * unit : (left + size[1]) * unit]
            total[place] += pixels * share
            weight[place] += share
    return total / weight


def starts(length: int) -> list[int]:
    """Where tiles begin along a side of `length` tokens: the last one ends with it."""
    if length <= TILE:
        return [0]
    return [*range(0, length - TILE, TILE - OVERLAP), length - TILE]


def _ramp(length: int, overlap: int, before: bool, after: bool) -> np.ndarray:
    """Weights `[length]` of a tile's pixels, falling towards the sides where another tile is."""
    rise = (np.arange(overlap, dtype=np.float32) + 0.5) / overlap
    weights = np.ones(length, np.float32)
    if before:
        weights[:overlap] *= rise
    if after:
        weights[-overlap:] *= rise[::-1]
    return weights
