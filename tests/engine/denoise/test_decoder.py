"""Images from latents: several at once, and in tiles."""

from __future__ import annotations

import types

import jax.numpy as jnp
import numpy as np
import pytest
from small import CONFIG, weights

from bagel_jax.engine.denoise import decoder
from bagel_jax.engine.denoise.decoder import starts
from bagel_jax.errors import InputError

UNIT, LIMIT = CONFIG.token_pixels, CONFIG.max_latent_size
NO_MODEL = types.SimpleNamespace(skeleton=None, arrays=None)


def latents(count: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random latent tokens, `[B, N, C p²]`."""
    shape = count, rows * columns, CONFIG.latent_dim
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def decode(weights, tokens, grid, *, tiled=False) -> np.ndarray:
    """Images of one size, `[B, H, W, 3]`."""
    return np.stack(decoder.decode(weights, tokens, [grid] * len(tokens), LIMIT, tiled=tiled))


@pytest.fixture
def tiles(monkeypatch):
    """Sets the sides of tiles and of overlaps, and lists the grids of what is decoded from then on."""

    def small(tile: int, overlap: int, run=None) -> list[tuple[int, int]]:
        seen, real = [], run or decoder.decode_latents
        monkeypatch.setattr(decoder, "TILE", tile)
        monkeypatch.setattr(decoder, "OVERLAP", overlap)

        def seeing(*args, **kwargs):
            seen.extend(map(tuple, args[-1]))
            return real(*args, **kwargs)

        monkeypatch.setattr(decoder, "decode_latents", seeing)
        return seen

    return small


def linear(channels: int = 3):
    """A stand-in for the decoder that sees no more than its own token: pixels are the token's first values."""

    def run(skeleton, arrays, tokens, size, spread=None):
        return np.asarray(tokens)[..., :channels].repeat(UNIT, axis=1).repeat(UNIT, axis=2)

    return run


def whole(tokens, grid) -> np.ndarray:
    """What `linear` makes of images in one piece."""
    return linear()(None, None, tokens.reshape(len(tokens), *grid, -1), None)


def test_several_at_once_equal_one_by_one():
    """A norm over the batch, or images that change places: an image depends on its neighbours."""
    tokens = latents(3, 5, 3)
    together = decode(weights(), tokens, (5, 3))
    assert together.shape == (3, 5 * UNIT, 3 * UNIT, 3)
    for i in range(3):
        np.testing.assert_allclose(together[i], decode(weights(), tokens[i : i + 1], (5, 3))[0], rtol=1e-4, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_sizes_in_one_call():
    """An image depends on those of other sizes that are decoded with it, or has their size."""
    grids = [(5, 8), (8, 5), (6, 6), (7, 8), (8, 8), (5, 5), (1, 2)]
    tokens = [latents(1, *grid, seed=i)[0] for i, grid in enumerate(grids)]
    images = decoder.decode(weights(), tokens, grids, LIMIT)
    for image, one, grid in zip(images, tokens, grids, strict=True):
        assert image.shape == (grid[0] * UNIT, grid[1] * UNIT, 3)
        assert image.base is None  # or one image would keep all others in memory
        np.testing.assert_allclose(image, decode(weights(), one[None], grid)[0], rtol=1e-4, atol=1e-4)


def test_groups():
    """Images are left out or decoded twice; or a number of them that no other had compiles, or is filled up."""
    for count in range(1, 20):
        groups = [list(group) for group in decoder.groups(range(count))]
        assert [i for group in groups for i in group] == list(range(count))
        assert {len(group) for group in groups} <= {1, 2, decoder.MAX_IMAGES}


@pytest.mark.parametrize(("tokens", "grid"), [(24, (5, 5)), (72, (9, 8)), (0, (0, 3))])
def test_bad_grids(tokens, grid):
    """Tokens are put into other places than theirs, or an error tells of reshaping."""
    with pytest.raises(InputError):
        decoder.decode(weights(), [np.zeros((tokens, CONFIG.latent_dim), np.float32)], [grid], LIMIT)


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
    image = decode(NO_MODEL, tokens, grid, tiled=True)
    assert len(seen) == 2 * len(starts(grid[0])) * len(starts(grid[1])) > 2
    np.testing.assert_allclose(image, whole(tokens, grid), rtol=1e-6, atol=1e-6)


def test_overlaps_are_blended(tiles):
    """The last tile wins where tiles overlap: a hard edge. Tiles of 0, 1, … make an image that rises evenly."""
    values = iter(range(2))

    def run(skeleton, arrays, tokens, size, spread=None):
        return np.full((1, tokens.shape[1] * UNIT, tokens.shape[2] * UNIT, 3), next(values), np.float32)

    tiles(4, 2, run)
    image = decode(NO_MODEL, latents(1, 6, 3), (6, 3), tiled=True)[0, :, 0, 0]
    overlap = 2 * UNIT
    np.testing.assert_array_equal(image[: 2 * UNIT], 0)
    np.testing.assert_array_equal(image[4 * UNIT :], 1)
    np.testing.assert_allclose(image[2 * UNIT : 4 * UNIT], (np.arange(overlap) + 0.5) / overlap, rtol=1e-6)


def test_a_grid_of_one_tile_is_decoded_whole(tiles):
    """A small image is cut, or is not the very image that there is without tiling."""
    seen = tiles(6, 2)
    tokens = latents(2, 6, 5)
    tiled = decode(weights(), tokens, (6, 5), tiled=True)
    assert seen == [(6, 5)] * 2
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
    assert seen == [(4, 3)] * 6  # one after another
    assert image.shape == (2, 8 * UNIT, 3 * UNIT, 3)
    assert image.dtype == np.float32


def errors(tiles, tile: int, overlap: int) -> tuple[float, int]:
    """Relative error of a tiled image, and how many tiles it has."""
    tokens = latents(1, 8, 8, seed=5)
    untiled = decode(weights(), tokens, (8, 8))
    seen = tiles(tile, overlap)
    tiled = decode(weights(), tokens, (8, 8), tiled=True)
    return float(np.linalg.norm(tiled - untiled) / np.linalg.norm(untiled)), len(seen)


def test_tiled_images_are_near_the_whole_one(tiles):
    """Tiles in other places, transposed or unblended: another image. Norms and attention over a tile shift little."""
    few, many = errors(tiles, 6, 4), errors(tiles, 4, 2)
    assert (few[1], many[1]) == (4, 9)
    assert 0 < few[0] < 0.12
    assert few[0] < many[0] < 0.25  # the less a tile sees


def test_pixels_of_another_dtype(tiles):
    """A bfloat16 model: tiles cannot be added up, or are added up in bfloat16."""
    run = linear()
    tiles(4, 2, lambda *args, **_: jnp.asarray(run(*args), jnp.bfloat16))
    tokens = latents(1, 8, 8)
    image = decode(NO_MODEL, tokens, (8, 8), tiled=True)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, whole(tokens, (8, 8)), rtol=1e-2, atol=1e-2)
