"""Padded images in the autoencoder: what is real comes out as if nothing else were there."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import CONFIG, drawn, new_stage, weights

from bagel_jax.buckets import bucket, grids, padded_grid
from bagel_jax.config import AutoencoderConfig
from bagel_jax.engine.context import steps
from bagel_jax.engine.denoise import decoder
from bagel_jax.errors import InputError
from bagel_jax.inputs.prepare import latent_positions
from bagel_jax.models import attention
from bagel_jax.models.autoencoder import AutoEncoder

# Of everything that there is at least one, in three levels: 4 pixels a latent cell.
DEEP = AutoencoderConfig(3, 32, (32, 64, 64), 1, 4, 0.3611, 0.1159)
UNIT = DEEP.downsample
TOLERANCE = 1e-5
LIMIT = CONFIG.max_latent_size


@functools.cache
def split(dtype=jnp.float32):
    graph, params = nnx.split(nnx.eval_shape(lambda: AutoEncoder(DEEP, dtype, nnx.Rngs(0))))
    return graph, jax.tree.map(lambda x: x.astype(dtype), drawn(params))


@functools.partial(jax.jit, static_argnames=("method", "graph"))
def _run(method, graph, params, *args):
    return getattr(nnx.merge(graph, params), method)(*args)


def run(method, *args, dtype=jnp.float32):
    return _run(method, *split(dtype), *args)


def draw(seed, *shape) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def padded(images, shape, filler) -> np.ndarray:
    """Images in the upper left corner of arrays of one shape, full of something else."""
    arrays = np.full((len(images), *shape, images[0].shape[-1]), filler, np.float32)
    for array, image in zip(arrays, images, strict=True):
        array[: image.shape[0], : image.shape[1]] = image
    return arrays


def near(ours, exact, tolerance=TOLERANCE) -> None:
    """Also the worst pixel is right, in units of the largest."""
    ours, exact = np.asarray(ours, np.float32), np.asarray(exact, np.float32)
    assert ours.shape == exact.shape
    assert np.abs(ours - exact).max() <= tolerance * np.abs(exact).max()
    assert np.linalg.norm(ours - exact) <= tolerance * np.linalg.norm(exact)


# In latent cells: the smallest, the whole, and two drawn ones, in one batch.
ROOM = 12, 10
SIZES = [(1, 1), ROOM, *map(tuple, np.random.RandomState(0).randint(2, ROOM, (2, 2)).tolist())]
FILLERS = [0.0, np.nan, 1e30, np.inf]


@pytest.mark.parametrize("filler", FILLERS)
def test_encoder(filler):
    """An edit depends on what its input image is padded with, or on those read with it; or its border is another."""
    images = [draw(i, UNIT * h, UNIT * w, 3) for i, (h, w) in enumerate(SIZES)]
    noise = [draw(10 + i, h, w, 4) for i, (h, w) in enumerate(SIZES)]
    pixels = padded(images, (UNIT * ROOM[0], UNIT * ROOM[1]), filler)
    latents = run("encode", pixels, padded(noise, ROOM, filler), UNIT * np.asarray(SIZES, np.int32))
    for i, (h, w) in enumerate(SIZES):
        near(latents[i, :h, :w], run("encode", images[i][None], noise[i][None])[0])


@pytest.mark.parametrize("filler", FILLERS)
def test_decoder(filler):
    """The same for images that are made."""
    latents = [draw(i, h, w, 4) for i, (h, w) in enumerate(SIZES)]
    images = run("decode", padded(latents, ROOM, filler), np.asarray(SIZES, np.int32))
    for image, one, (h, w) in zip(images, latents, SIZES, strict=True):
        near(image[: UNIT * h, : UNIT * w], run("decode", one[None])[0])


def test_one_size_for_all():
    """A size without the batch's axis is another one, or none."""
    latents = draw(0, 2, 4, 4, 4)
    exact = run("decode", latents[:, :3, :2])
    near(run("decode", latents, np.asarray([3, 2], np.int32))[:, :12, :8], exact)
    whole = run("decode", latents, np.asarray([4, 4], np.int32))
    near(whole, run("decode", latents))
    assert np.abs(whole[:, :12, :8] - exact).max() > 0.1  # or all of this is the same anyway


def test_sizes_between_latent_cells():
    """Pixels that make no whole latent cell: they are seen where halving rounds down, and must be here."""
    pixels = draw(0, 1, 11, 14, 3)
    exact, size = run("moments", pixels), np.asarray([11, 14], np.int32)
    for ours, wanted in zip(run("moments", padded(pixels, (16, 16), np.nan), size), exact, strict=True):
        assert wanted.shape[1:3] == (2, 3)
        near(ours[:, :2, :3], wanted)


def test_sliced_attention(monkeypatch):
    """Attention for a slice of the queries at a time, as large images have it, sees padding."""
    latents = draw(0, 1, 5, 4, 4)
    exact, size = run("decode", latents)[0], np.asarray([5, 4], np.int32)
    monkeypatch.setattr(attention, "_MAX_SCORES", dict.fromkeys(("cpu", "default"), 7 * 64))
    graph, params = split()
    sliced = jax.jit(lambda *args: nnx.merge(graph, params).decode(*args))(padded(latents, (8, 8), np.nan), size)
    near(sliced[0, :20, :16], exact)


def test_bfloat16():
    """A model in bfloat16 takes sums over padding, or gives another type."""
    latents, size = draw(0, 1, 5, 4, 4), np.asarray([5, 4], np.int32)
    ours = run("decode", padded(latents, (8, 8), np.nan), size, dtype=jnp.bfloat16)
    assert ours.dtype == jnp.float32
    near(ours[:, :20, :16], run("decode", latents, dtype=jnp.bfloat16), 3e-2)


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 32, 30, 3), (2,)), ((2, 32, 32, 3), (3, 2)), ((2, 32, 32, 3), (2, 1))]
)
def test_bad_sizes(shape, size):
    """Other pixels than meant are taken for padding."""
    with pytest.raises(InputError):
        run("moments", np.zeros(shape, np.float32), np.ones(size, np.int32))


# The programs around it.


def embedded(stage, pixels, noise) -> np.ndarray:
    """An image's block as stage 0 makes it, `[N, D]`, without its padding."""
    rows, columns = (side // CONFIG.token_pixels for side in pixels.shape[:2])
    tokens, index = stage._encode(pixels, noise)
    positions = latent_positions((rows, columns), CONFIG)
    padding = bucket(len(index), 64) - len(index)
    index, positions = np.pad(index, (0, padding), constant_values=-1), np.pad(positions, (0, padding))
    block = np.asarray(steps.embed_vae(weights().skeleton, weights().arrays, tokens, index, positions))
    assert not block[len(block) - padding :].any()
    return block[: len(block) - padding]


def exactly(pixels, noise) -> np.ndarray:
    """The same without any padding."""
    whole = weights().model()
    rows, columns = (side // CONFIG.token_pixels for side in pixels.shape[:2])
    tokens = whole.patchify_latents(whole.autoencoder.encode(pixels[None], noise[None])[0])
    return whole.embed_latents(tokens[None], jnp.zeros((1, 1)), latent_positions((rows, columns), CONFIG))[0]


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (1, 8), (3, 2)])
def test_embedded_images(grid):
    """Tokens of an input image are in other places, or padding is among them."""
    pixels = draw(0, *(side * CONFIG.token_pixels for side in grid), 3)
    noise = draw(1, *(side * CONFIG.latent_patch_size for side in grid), 4)
    near(embedded(new_stage(), pixels, noise), exactly(pixels, noise))


def test_images_with_part_of_a_token():
    """A model whose tokens are larger than the resize's stride: what fills no token is lost before it is encoded."""
    pixels, noise = draw(0, 18, 26, 3), draw(1, 9, 13, 4)
    near(embedded(new_stage(), pixels, noise), exactly(pixels, noise))


def test_few_programs():
    """Every size of an image compiles a program of its own: on the real model that costs minutes each."""
    programs = [program.on("cpu") for program in (steps.encode_image, decoder.decode_latents)]
    for program in programs:
        program.clear_cache()
    stage, by_grid = new_stage(), {}
    for rows, columns in itertools.product(range(1, LIMIT + 1), repeat=2):
        stage._encode(draw(0, 4 * rows, 4 * columns, 3), draw(1, 2 * rows, 2 * columns, 4))
        by_grid.setdefault(padded_grid(rows, columns, LIMIT), []).append((rows, columns))
    assert sorted(by_grid) == grids(LIMIT)
    for alike in by_grid.values():
        for count in range(1, 8):
            some = alike[-count:]
            latents = [draw(0, rows * columns, CONFIG.latent_dim) for rows, columns in some]
            decoder.decode(weights(), latents, some, LIMIT)
    encoders, decoders = (program._cache_size() for program in programs)
    assert encoders == len(grids(LIMIT)) == 4
    assert decoders == 3 * encoders  # one, two or four images
