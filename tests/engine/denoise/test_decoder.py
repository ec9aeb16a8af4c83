"""Images from latents: several at once, and in tiles."""

from __future__ import annotations

import types

import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, weights

from bagel_jax.engine.denoise import decoder
from bagel_jax.engine.denoise.decoder import decode, starts

UNIT = CONFIG.token_pixels


def latents(count: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random latent tokens, `[B, N, C p²]`."""
    shape = count, rows * columns, CONFIG.latent_dim
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def tiles(monkeypatch):
    """Sets the sides of tiles and of overlaps, and lists the grids that are decoded from then on."""

    def small(tile: int, overlap: int, run=None) -> list[tuple[int, int]]:
        seen, real = [], run or decoder.decode_latents
        monkeypatch.setattr(decoder, "TILE", tile)
        monkeypatch.setattr(decoder, "OVERLAP", overlap)
        monkeypatch.setattr(decoder, "decode_latents", lambda *args: (seen.append(args[-1]), real(*args))[1])
        return seen

    return small


def linear(channels: int = 3):
    """A stand-in for the decoder that sees no more than its own token: pixels are the token's first values."""

    def run(skeleton, arrays, tokens, grid):
        cells = np.asarray(tokens)[..., :channels].reshape(len(tokens), *grid, channels)
        return cells.repeat(UNIT, axis=1).repeat(UNIT, axis=2)

    return run


def test_several_at_once_equal_one_by_one():
    """A norm over the batch, or images that change places: an image depends on its neighbours."""
    tokens = latents(3, 5, 3)
    together = decode(weights(), tokens, (5, 3))
    assert together.shape == (3, 5 * UNIT, 3 * UNIT, 3)
    for i in range(3):
        np.testing.assert_allclose(together[i], decode(weights(), tokens[i : i + 1], (5, 3))[0], rtol=1e-4, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.parametrize(("tile", "overlap"), [(32, 8), (4, 2), (3, 1), (5, 2), (2, 1), (4, 0)])
def test_starts(tiles, tile, overlap):
    """Rows between tiles that none covers, a tile that begins or ends outside, or less overlap than was asked for."""
    tiles(tile, overlap)
    for length in range(1, 4 * tile):
        begins = starts(length)
        ends = [begin + min(tile, length) for begin in begins]
        assert begins[0] == 0
        assert ends[-1] == length
        assert begins == sorted(set(begins))
        assert all(end - begin >= overlap for end, begin in zip(ends, begins[1:], strict=False))
        assert {i for begin, end in zip(begins, ends, strict=True) for i in range(begin, end)} == set(range(length))
        assert len(begins) == 1 or length > tile


def test_published_tiles():
    """A 1024² image of the published model, 64 tokens a side, in other tiles than written down."""
    assert starts(64) == [0, 24, 32]
    assert starts(32) == [0]
    assert starts(33) == [0, 1]


@pytest.mark.parametrize("grid", [(8, 8), (7, 3), (2, 8), (5, 6)])
@pytest.mark.parametrize(("tile", "overlap"), [(4, 2), (3, 1), (5, 3)])
def test_weights_sum_to_one(tiles, grid, tile, overlap):
    """Seams: what several tiles agree on comes out darker or brighter where they overlap, or moved."""
    seen = tiles(tile, overlap, linear())
    tokens = latents(2, *grid)
    image = decode(types.SimpleNamespace(skeleton=None, arrays=None), tokens, grid, tiled=True)
    assert len(seen) == len(starts(grid[0])) * len(starts(grid[1])) > 1
    np.testing.assert_allclose(image, linear()(None, None, tokens, grid), rtol=1e-6, atol=1e-6)


def test_overlaps_are_blended(tiles):
    """The last tile wins where tiles overlap: a hard edge. Tiles of 0, 1, … make an image that rises evenly."""
    values = iter(range(2))

    def run(skeleton, arrays, tokens, grid):
        return np.full((len(tokens), grid[0] * UNIT, grid[1] * UNIT, 3), next(values), np.float32)

    tiles(4, 2, run)
    made = types.SimpleNamespace(skeleton=None, arrays=None)
    image = decode(made, latents(1, 6, 3), (6, 3), tiled=True)[0, :, 0, 0]
    overlap = 2 * UNIT
    np.testing.assert_array_equal(image[: 2 * UNIT], 0)
    np.testing.assert_array_equal(image[4 * UNIT :], 1)
    np.testing.assert_allclose(image[2 * UNIT : 4 * UNIT], (np.arange(overlap) + 0.5) / overlap, rtol=1e-6)


def test_a_grid_of_one_tile_is_decoded_whole(tiles):
    """A small image is cut, or is not the very image that there is without tiling."""
    seen = tiles(6, 2)
    tokens = latents(2, 6, 5)
    tiled = decode(weights(), tokens, (6, 5), tiled=True)
    assert seen == [(6, 5)]
    np.testing.assert_array_equal(tiled, decode(weights(), tokens, (6, 5)))


def test_tiling_is_off_unless_asked_for(tiles):
    """An image that would fit into memory is decoded in tiles, which see less."""
    seen = tiles(2, 1)
    decode(weights(), latents(1, 6, 5), (6, 5))
    assert seen == [(6, 5)]


def test_no_tile_is_larger_than_a_tile(tiles):
    """The decoder needs the memory of the whole image although tiles were asked for."""
    seen = tiles(4, 2)
    tokens = latents(2, 8, 3)
    image = decode(weights(), tokens, (8, 3), tiled=True)
    assert seen == [(4, 3)] * 3
    assert image.shape == (2, 8 * UNIT, 3 * UNIT, 3)
    assert image.dtype == np.float32


def errors(tiles, tile: int, overlap: int) -> tuple[float, int]:
    """Relative error of a tiled image, and how many tiles it has."""
    tokens = latents(1, 8, 8, seed=5)
    whole = decode(weights(), tokens, (8, 8))
    seen = tiles(tile, overlap)
    tiled = decode(weights(), tokens, (8, 8), tiled=True)
    return float(np.linalg.norm(tiled - whole) / np.linalg.norm(whole)), len(seen)


def test_tiled_images_are_near_the_whole_one(tiles):
    """Tiles in other places, transposed or unblended: another image. Norms and attention over a tile shift little."""
    few, many = errors(tiles, 6, 4), errors(tiles, 4, 2)
    assert (few[1], many[1]) == (4, 9)
    assert 0 < few[0] < 0.12
    assert few[0] < many[0] < 0.25  # the less a tile sees


def test_pixels_of_another_dtype(tiles):
    """A bfloat16 model: tiles cannot be added up, or are added up in bfloat16."""
    run = linear()
    tiles(4, 2, lambda *args: jnp.asarray(run(*args), jnp.bfloat16))
    tokens = latents(1, 8, 8)
    image = decode(types.SimpleNamespace(skeleton=None, arrays=None), tokens, (8, 8), tiled=True)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, linear()(None, None, tokens, (8, 8)), rtol=1e-2, atol=1e-2)
