"""Images from latents: several of one size at once, or in tiles where an image is large.

In one piece the decoder of a 1024² image holds gigabytes. In tiles it holds those of one tile, but the decoder's
norms and its attention then see a tile instead of the image, so that colours may shift a little from tile to tile.
Tiles overlap, and are blended there.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from bagel_jax.models.weights import Weights

# In latent tokens: a tile's side (512 pixels in the published model), and how far tiles overlap.
TILE, OVERLAP = 32, 8


@partial(jax.jit, static_argnames=("skeleton", "grid"))
def decode_latents(skeleton, arrays, tokens, grid: tuple[int, int]) -> jax.Array:
    """Latent tokens `[B, N, C p²]` on a grid (rows, columns) -> pixels `[B, H, W, 3]`, about [-1, 1], not clipped."""
    model = skeleton.merge(arrays)
    return model.autoencoder.decode(jax.vmap(lambda x: model.unpatchify_latents(x, *grid))(tokens))


def decode(weights: Weights, tokens: np.ndarray, grid: tuple[int, int], *, tiled: bool = False) -> np.ndarray:
    """`decode_latents`, in tiles where the grid is larger than one and `tiled` is set.

    Source of the tiling: `tiled_decode` in diffusers' `AutoencoderKL`.
    """
    run = partial(decode_latents, weights.skeleton, weights.arrays)
    if not tiled or max(grid) <= TILE:
        return np.asarray(run(tokens, grid))
    batch, rows, columns = len(tokens), *grid
    cells = tokens.reshape(batch, rows, columns, -1)
    total, weight = None, None
    for top in starts(rows):
        for left in starts(columns):
            size = min(TILE, rows), min(TILE, columns)
            tile = cells[:, top : top + size[0], left : left + size[1]].reshape(batch, size[0] * size[1], -1)
            pixels = np.asarray(run(tile, size))
            unit = pixels.shape[1] // size[0]
            if total is None:
                total = np.zeros((batch, rows * unit, columns * unit, pixels.shape[-1]), np.float32)
                weight = np.zeros((1, rows * unit, columns * unit, 1), np.float32)
            share = (
                _ramp(size[0] * unit, OVERLAP * unit, top > 0, top + size[0] < rows)[:, None, None]
                * _ramp(size[1] * unit, OVERLAP * unit, left > 0, left + size[1] < columns)[:, None]
            )
            where = np.s_[:, top * unit : (top + size[0]) * unit, left * unit : (left + size[1]) * unit]
            total[where] += pixels * share
            weight[where] += share
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
