"""The published sizes, traced abstractly: shapes and parameter counts, with nothing allocated.

The shapes of all tensors of the published checkpoint and its json files are in `tests/data/official`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import DATA, official_shapes
from PIL import Image

from bagel_jax.buckets import bucket
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.checkpoint.table import AUTOENCODER, MAIN
from bagel_jax.config import ImageTransform
from bagel_jax.engine.context import steps
from bagel_jax.engine.context.scheduler import MAX_TEXTS
from bagel_jax.engine.denoise.decoder import decode_latents
from bagel_jax.engine.denoise.steps import DenoiseBatch, DenoiseProgram, DenoiseRows, DenoiseState, denoise
from bagel_jax.inputs.images import prepare_image
from bagel_jax.models.weights import abstract_weights, flatten
from bagel_jax.request import MAX_STEPS
from bagel_jax.sampling.guidance import Guidance
from bagel_jax.sampling.taylorseer import Forecasts
from bagel_jax.sampling.tokens import SamplingParams

L, K, E, V = 28, 4, 128, 152064
INT = jax.ShapeDtypeStruct((), jnp.int32)
PAGES = jax.ShapeDtypeStruct((L, 2048, K, 2, 64, E), jnp.bfloat16)


class Shapes:
    """Stands in for `CheckpointFiles`: the official shapes, no tensors."""

    directory = DATA / "official"

    shapes = staticmethod(official_shapes)


@pytest.fixture(scope="module")
def config():
    return read_config(Shapes())


@pytest.fixture(scope="module")
def weights(config):
    return abstract_weights(config, jnp.bfloat16)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape):
    return array(*shape, dtype=jnp.int32)


def shapes(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def test_sizes(config):
    """A size of the published model is read wrong: it does not load, or is cut."""
    t, v, a = config.trunk, config.vit, config.autoencoder
    assert (t.num_layers, t.hidden_size, t.num_heads, t.num_kv_heads, t.head_dim) == (L, 3584, 28, K, E)
    assert (t.mlp_width, t.vocab_size, t.rope_theta, t.norm_eps) == (18944, V, 1e6, 1e-6)
    assert (v.num_layers, v.hidden_size, v.num_heads, v.mlp_width, v.patch_size) == (26, 1152, 16, 4304, 14)
    assert (a.base_width, a.widths, a.num_res_blocks, a.latent_channels) == (128, (128, 256, 512, 512), 2, 16)
    assert (config.latent_patch_size, config.token_pixels, config.latent_dim) == (2, 16, 64)
    assert (config.max_latent_size, config.max_image_size, config.max_vit_patches) == (64, 1024, 70)
    assert config.vae_transform == ImageTransform(1024, 512, 16)
    assert config.vit_transform == ImageTransform(980, 224, 14)


def test_number_of_parameters(weights):
    """Parameters are missing or doubled; or they are stored in float32 and take twice the memory."""
    params = flatten(weights.params)
    assert all(isinstance(p, jax.ShapeDtypeStruct) and p.dtype == jnp.bfloat16 for p in params.values())
    sizes = {name: int(np.prod(p.shape)) for name, p in params.items()}

    def count(*prefixes):
        return sum(size for name, size in sizes.items() if name.startswith(prefixes))

    billions = {
        "understanding": count("trunk.layers.und") / 1e9,
        "generation": count("trunk.layers.gen") / 1e9,
        "embedding and head": count("trunk.embed", "trunk.lm_head") / 1e9,
        "vit": count("vit.") / 1e9,
        "autoencoder": count("autoencoder.") / 1e9,
        "all but the autoencoder": (sum(sizes.values()) - count("autoencoder.")) / 1e9,
    }
    assert billions["understanding"] == pytest.approx(6.53, abs=0.01)
    assert billions["generation"] == pytest.approx(6.53, abs=0.01)
    assert billions["embedding and head"] == pytest.approx(1.09, abs=0.005)
    assert billions["vit"] == pytest.approx(0.41, abs=0.01)
    assert billions["autoencoder"] == pytest.approx(0.084, abs=0.0005)
    assert billions["all but the autoencoder"] == pytest.approx(14.6, abs=0.1)


@pytest.mark.parametrize(("kind", "prefix"), [(MAIN, ""), (AUTOENCODER, "autoencoder.")])
def test_every_published_number_has_a_place(weights, kind, prefix):
    """Tensors of the published checkpoint are left out of the model, or some of its own are in none."""
    published = sum(int(np.prod(shape)) for shape in official_shapes(kind).values())
    ours = sum(
        int(np.prod(p.shape))
        for name, p in flatten(weights.params).items()
        if name.startswith("autoencoder.") == (kind == AUTOENCODER)
    )
    assert ours == published


def test_largest_image_in_both_encoders(config):
    """A 1024 x 1024 image does not fit the position tables."""
    made = prepare_image(Image.new("RGB", (1024, 1024)), config)
    assert made.vae_pixels.shape == (1024, 1024, 3)
    assert made.vit_patches.shape == (4900, 588)


def prefill_batch(text, image=None, sequences=MAX_TEXTS + 2):
    """The arrays of a chunk to prefill: `text` tokens, and `image` of an image."""
    block = None if image is None else array(image, 3584, dtype=jnp.bfloat16)
    total = text + (image or 0)
    return steps.PrefillBatch(
        ints(text), block, *(ints(total) for _ in range(4)), ints(sequences + 1), ints(sequences, 512)
    )


def decode_batch(count):
    """The arrays of rows that decode, their pages, and how they choose."""
    rows = steps.DecodeBatch(*(ints(count) for _ in range(5)), array(count, dtype=jnp.bool_))
    sampling = SamplingParams(
        array(count, 2, dtype=jnp.uint32), array(count, dtype=jnp.bool_), array(count), ints(count), array(count)
    )
    return rows, ints(count, 512), sampling


@pytest.mark.parametrize("chunk", [(2048,), (64, bucket(4900, 64)), (64, 4096)], ids=["text", "patches", "latents"])
def test_prefill(weights, chunk):
    """The largest step does not trace at full size, or its pages change type."""
    static = steps.ContextProgram(weights.skeleton, "xla")._replace(latents=chunk[-1] == 4096)
    made = prefill_batch(*chunk)
    _, pages = jax.eval_shape(lambda *a: steps.prefill(static, *a), weights.arrays, PAGES, made)
    assert shapes(pages) == shapes(PAGES)
    rows, table, sampling = decode_batch(16)
    mixed = jax.eval_shape(lambda *a: steps.mixed(static, *a), weights.arrays, PAGES, rows, table, made, sampling)
    assert shapes(mixed) == [((16, 1), jnp.int32), *shapes(PAGES)]


def test_embedding_of_images(weights):
    """The largest image does not trace through the ViT or the autoencoder."""
    padded = bucket(4900, 64)
    args = array(padded, 588), array(padded, dtype=jnp.int32), INT
    vit = jax.eval_shape(lambda *a: steps.embed_vit(weights.skeleton, *a), weights.arrays, *args)
    assert shapes(vit) == [((padded, 3584), jnp.bfloat16)]
    args = array(1024, 1024, 3), array(128, 128, 16), ints(2)
    tokens = jax.eval_shape(lambda *a: steps.encode_image(weights.skeleton, *a, 4096), weights.arrays, *args)
    assert shapes(tokens) == [((4096, 64), jnp.float32)]
    args = tokens, ints(4096), ints(4096)
    vae = jax.eval_shape(lambda *a: steps.embed_vae(weights.skeleton, *a), weights.arrays, *args)
    assert shapes(vae) == [((4096, 3584), jnp.bfloat16)]


def test_decoding(weights):
    """The decoding program does not trace at full size."""
    static = steps.ContextProgram(weights.skeleton, "xla")
    rows, *rest = decode_batch(16)
    chosen, after, pages = jax.eval_shape(
        lambda *a: steps.decode(static, *a), weights.arrays, PAGES, rows, *rest, INT, INT
    )
    assert shapes(chosen) == [((16, steps.MAX_CALL), jnp.int32)]
    assert shapes(after) == shapes(rows)  # with which the next call goes on
    assert shapes(pages) == shapes(PAGES)
    logits, _ = jax.eval_shape(
        lambda p, pages, r, t: steps.advance(weights.skeleton.merge(p), pages, r, t, None, static),
        weights.arrays,
        PAGES,
        rows,
        rest[0],
    )
    assert (logits.shape, logits.dtype) == ((16, V), jnp.float32)


@pytest.mark.parametrize("forecasting", [False, True], ids=["computed", "TaylorSeer"])
def test_denoising(weights, forecasting):
    """Edits at 1024 x 1024 with three branches each do not trace, or their latents change type on the way."""
    requests, rows, tokens = 2, 6, 4096
    batch = DenoiseBatch(
        active=array(requests, dtype=jnp.bool_),
        step=ints(requests),
        timesteps=array(requests, MAX_STEPS),
        deltas=array(requests, MAX_STEPS),
        tokens=ints(requests),
        position_ids=ints(requests, tokens),
        text_on=array(requests, dtype=jnp.bool_),
        drop_text=ints(requests),
        drop_image=ints(requests),
        guidance=Guidance(array(requests), array(requests), ints(requests), array(requests)),
        markers=ints(2),
    )
    terms = ahead = None
    if forecasting:
        terms = array(requests, 3, 7, tokens, 3584, dtype=jnp.bfloat16)
        ahead = Forecasts(ints(requests, 3), array(requests, 3), array(requests, 3, dtype=jnp.bool_))
    state = DenoiseState(array(requests, tokens, 64), PAGES, terms)
    static = DenoiseProgram(weights.skeleton, "xla", tokens)
    views = DenoiseRows(ints(rows), ints(rows), ints(rows), ints(rows), ints(rows, 256))
    out, ready = jax.eval_shape(
        lambda params, *a: denoise(static, params, *a), weights.arrays, state, batch, views, ahead, INT
    )
    assert shapes(out) == shapes(state)
    assert shapes(ready) == [((requests,), jnp.int32)]


def test_pixels(weights):
    """The decoder does not trace at 1024 x 1024, or hands out pixels in bfloat16."""
    for grid, size in (((64, 64), (1024, 1024)), ((36, 64), (576, 1024))):
        out = jax.eval_shape(
            lambda *args: decode_latents(weights.skeleton, *args),
            weights.arrays,
            array(2, *grid, 64),
            ints(2, 2),
        )
        assert (out.shape, out.dtype) == ((2, *size, 3), jnp.float32)
