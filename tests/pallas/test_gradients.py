"""Gradients of paged attention, whatever the backend, against those of the plain definition."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas.backends import BACKENDS, on_gpu
from pallas.ragged_batches import TOLERANCE, draw, draw_blocks, draw_decode

from bagel_jax.pallas.paged_attention import xla
from bagel_jax.pallas.paged_attention.api import paged_attention, paged_blocks, paged_decode
from bagel_jax.pallas.paged_attention.tiles import Tiling

# As on Hopper: the keys of one query shared out, and a tile for each query head.
BACKENDS["xla-split"] = xla.backend()._replace(decode_tiling=lambda q, pages: Tiling(1, rows=8, splits=2))


def _by_head(q, pages, layer, page_table, tiles):
    pages = jnp.repeat(pages, q.shape[1] // pages.shape[2], axis=2)
    return xla.attend_tiles(q, pages, layer, page_table, tiles)


BACKENDS["xla-by-head"] = xla.backend()._replace(
    prefill_tiling=lambda q, pages, num_sequences: Tiling(16, by_head=True), attend=_by_head
)


def plain(q, pages, layer, page_table, sequence, kv_end):
    """Output `[T, H, E]` and log-sum-exp `[T, H]` as in the definition; pages without NaN."""
    kv = pages[layer, page_table[sequence]].transpose(3, 0, 1, 4, 2, 5)  # [2, T, n, page, K, E]
    k, v = kv.reshape(2, len(q), -1, *kv.shape[4:]).astype(jnp.float32).repeat(q.shape[1] // pages.shape[2], axis=3)
    scores = jnp.einsum("the,tshe->ths", q.astype(jnp.float32), k, precision="highest") * q.shape[-1] ** -0.5
    seen = jnp.arange(k.shape[1]) < kv_end[:, None, None]
    lse = jax.nn.logsumexp(jnp.where(seen, scores, -1e30), axis=-1)
    weights = jnp.exp(jnp.where(seen, scores - lse[..., None], -jnp.inf))
    return jnp.einsum("ths,tshe->the", weights, v, precision="highest"), lse


def check(backend, function, batch, dtype="float32"):
    """Gradients of random sums of output and log-sum-exp with respect to queries and pages."""
    assert BACKENDS[backend].supports(*batch.arguments(dtype)[:2])
    take = {paged_attention: batch.arguments, paged_blocks: batch.blocks, paged_decode: batch.decode}[function]
    q, pages, *others = take(dtype)
    real = np.arange(len(batch.q)) < batch.query_offsets[-1]
    sees = (batch.kv_end > 0) & real
    generator = np.random.default_rng(7)
    by_out = generator.standard_normal(batch.q.shape).astype(np.float32) * sees[:, None, None]
    by_lse = generator.standard_normal(batch.q.shape[:2]).astype(np.float32)

    def total(attention, q, pages):
        out, lse = (
            x.reshape(shape) for x, shape in zip(attention(q, pages), (by_out.shape, by_lse.shape), strict=True)
        )
        return (out * by_out).sum() + (jnp.where(sees[:, None], lse, 0) * by_lse).sum()

    def tested(q, pages):
        return function(q, pages, *others, backend=backend, return_lse=True)

    sequence = np.searchsorted(batch.query_offsets[1:], np.arange(len(batch.q)), side="right")
    sequence = np.minimum(sequence, len(batch.page_table) - 1)

    def wanted(q, pages):
        return plain(q, pages, batch.layer, batch.page_table, sequence, batch.kv_end)

    got = jax.jit(jax.grad(partial(total, tested), argnums=(0, 1)))(q, pages)
    expected = jax.grad(partial(total, wanted), argnums=(0, 1))(batch.q, np.nan_to_num(batch.pages))
    for one, other, like in zip(got, expected, (q, pages), strict=True):
        assert one.dtype == like.dtype
        one, other = np.asarray(one, np.float32), np.asarray(other).reshape(one.shape)
        # Where no token lives nothing is changed, and pages hold NaN.
        np.testing.assert_allclose(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * np.abs(other).max())


BY_XLA = ["xla", "tpu-interpret", on_gpu(slow=True)]


def sizes_of(backend):
    """The least that the backend takes."""
    return {"width": 64, "dtype": "bfloat16"} if backend == "gpu-interpret" else {}


@pytest.mark.parametrize("backend", [*BY_XLA, "xla-by-head"])
def test_ragged(backend):
    """A model trained or probed through the kernels would learn from tokens that it does not see."""
    batch = draw(0, [1, 15, 16, 17, 47, 0, 32, 5], **sizes_of(backend))
    check(backend, paged_attention, batch, sizes_of(backend).get("dtype", "float32"))


@pytest.mark.parametrize("backend", BY_XLA)
def test_blocks(backend):
    """Contexts of several blocks of keys, an empty one, a block that is padded, a row of padding."""
    batch = draw_blocks(5, [300, 0, 16, 40], [21, 21, 9, 0], 21, **sizes_of(backend))
    check(backend, paged_blocks, batch, sizes_of(backend).get("dtype", "float32"))


@pytest.mark.parametrize("backend", ["xla", "xla-split"])
def test_decode(backend):
    """One query a sequence, whose keys may be split among tiles, of which some have none."""
    check(backend, paged_decode, draw_decode(2, [1, 16, 0, 330, 15]))


@pytest.mark.parametrize("backend", ["xla", "tpu-interpret"])
def test_bfloat16(backend):
    """Gradients come in the type of what they belong to."""
    check(backend, paged_attention, draw(1, [30, 3], [14, 2], dtype="bfloat16"), "bfloat16")
