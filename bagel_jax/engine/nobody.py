"""Arguments of programs in which there is nobody: no row, no token, all that is written goes to page 0.

For compiling ahead, whether programs are run on them (`precompile.py`) or only their shapes are looked at (`aot`).
"""

from __future__ import annotations

import jax
import numpy as np

from bagel_jax.config import BagelConfig
from bagel_jax.engine.context.batch import decode_batch, page_table
from bagel_jax.engine.context.scheduler import MAX_TEXTS
from bagel_jax.engine.context.steps import DecodeBatch, PrefillBatch
from bagel_jax.engine.denoise.batch import denoise_batch, denoise_rows
from bagel_jax.engine.denoise.steps import DenoiseBatch, DenoiseRows
from bagel_jax.sampling.tokens import SamplingParams


def prefilling(size: int, image: jax.Array | jax.ShapeDtypeStruct | None, width: int) -> PrefillBatch:
    """`size` tokens of text and the block of an image `[N, D]`, if any; page tables are `width` pages wide."""
    count = size + (0 if image is None else image.shape[0])
    zeros = np.zeros((4, count), np.int32)
    offsets = np.asarray([0] * (MAX_TEXTS + 1) + [size, count], np.int32)
    return PrefillBatch(np.zeros(size, np.int32), image, *zeros, offsets, np.zeros((MAX_TEXTS + 2, width), np.int32))


def decoding(count: int, width: int) -> tuple[DecodeBatch, np.ndarray, SamplingParams]:
    """So many rows, their page tables, and how they choose."""
    rows, sampling = decode_batch([], count)
    return rows, page_table([], count, width), sampling


def patches(c: BagelConfig, count: int) -> tuple[np.ndarray, np.ndarray, np.int32]:
    """So many patches of an image, their positions, and how many there are."""
    return np.zeros((count, c.vit.channels * c.vit.patch_size**2), np.float32), np.zeros(count, np.int32), np.int32(1)


def image(c: BagelConfig, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image of a padded grid of latent tokens, for the autoencoder: its pixels, noise, and size."""
    pixels, cells = (
        np.zeros((grid[0] * unit, grid[1] * unit, width), np.float32)
        for unit, width in ((c.token_pixels, 3), (c.latent_patch_size, c.autoencoder.latent_channels))
    )
    return pixels, cells, np.asarray(pixels.shape[:2], np.int32)


def denoising(
    c: BagelConfig, slots: int, tokens: int, rows: int, width: int, markers: np.ndarray
) -> tuple[DenoiseBatch, DenoiseRows]:
    """So many slots of so many latent tokens, and rows with page tables `width` pages wide."""
    none = denoise_rows([], slots)
    nobody = none._replace(
        slot=np.full(rows, slots, np.int32),
        **{name: np.zeros(rows, np.int32) for name in ("view", "rope", "length")},
        page_table=np.zeros((rows, width), np.int32),
    )
    return denoise_batch([], slots, tokens, c, markers), nobody
