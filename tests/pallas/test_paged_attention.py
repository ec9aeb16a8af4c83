"""Every backend of paged attention that runs here against the truth, on one base of cases.

Fast are the least combinations that see each part of a kernel; the others are `slow`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from pallas.backends import check, close, on_gpu
from pallas.ragged_batches import draw, draw_blocks, draw_decode

from bagel_jax.pallas.paged_attention.api import paged_attention, paged_blocks, paged_decode

NAMES = ("reference", "xla", "tpu-interpret", "tpu-races")
BOTH = ("float32", "bfloat16")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def every_type(*fast):
    """Backend and type, those not named `slow`; Hopper takes no float32."""
    pairs = [(name, dtype) for name in NAMES for dtype in BOTH]
    on_cpu = [pair if pair in fast else slow(*pair) for pair in pairs]
    return [*on_cpu, on_gpu("bfloat16", slow=("gpu-interpret", "bfloat16") not in fast)]


FAST = [(name, dtype) for name in ("reference", "xla") for dtype in BOTH] + [("tpu-interpret", "bfloat16")]


def sizes_of(backend):
    """The least that the backend takes."""
    return {"width": 64} if backend == "gpu-interpret" else {}


@pytest.mark.parametrize(
    ("backend", "dtype"), every_type(*FAST, ("tpu-races", "float32"), ("gpu-interpret", "bfloat16"))
)
def test_ragged(backend, dtype):
    """An image would see text that comes after it, or lose part of its own, if a block's mask were wrong.

    Texts and image blocks mixed, lengths on and beside page borders, a sequence without a query.
    """
    check(backend, draw(0, [1, 15, 16, 17, 47, 0, 32, 5], dtype=dtype, **sizes_of(backend)), dtype)


@pytest.mark.parametrize(("backend", "dtype"), every_type())
def test_long(backend, dtype):
    """A context of several blocks of keys would lose one where one block ends and the next begins."""
    check(backend, draw(1, [300, 3], [140, 0], dtype=dtype, **sizes_of(backend)), dtype)


@pytest.mark.parametrize(
    ("backend", "dtype"), every_type(*FAST, ("tpu-races", "float32"), ("gpu-interpret", "bfloat16"))
)
def test_decode(backend, dtype):
    """An answer would go astray in a batch of different lengths, one of them a row of padding."""
    check(backend, draw_decode(2, [1, 16, 0, 33, 15], dtype=dtype, **sizes_of(backend)), dtype, paged_decode)


SHAPES = [(14, 2, 128, 16), (7, 1, 64, 32), (2, 2, 16, 128)]


@pytest.mark.parametrize(("heads", "kv_heads", "width", "page"), SHAPES)
@pytest.mark.parametrize("backend", ["reference", "xla", slow("tpu-interpret"), slow("tpu-races")])
def test_shapes(backend, heads, kv_heads, width, page):
    """G = 7 as in the published model, no grouping, and head widths and pages from the least to the largest."""
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width, "page": page}
    check(backend, draw(3, [page, page + 1, 2], **sizes))
    check(backend, draw_decode(4, [page - 1, 2 * page, 1], **sizes), function=paged_decode)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "page"), [(64, 16), (64, 128), (128, 32), (128, 64)])
@pytest.mark.parametrize("backend", [on_gpu()])
def test_shapes_on_hopper(backend, width, page):
    """As `test_shapes`, within what the kernel takes."""
    sizes = {"heads": 7, "kv_heads": 1, "width": width, "page": page, "dtype": "bfloat16"}
    check(backend, draw(3, [page, page + 1, 2], **sizes), "bfloat16")
    check(backend, draw_decode(4, [page - 1, 2 * page, 1], **sizes), "bfloat16", paged_decode)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize(("function", "make"), [(paged_attention, draw), (paged_decode, draw_decode)])
def test_without_lse(function, make, backend, dtype):
    """The model would go on in float32, in twice the memory, if the output were not of the queries' type."""
    batch = make(5, [1, 18], dtype=dtype)
    arguments = batch.arguments(dtype)
    if function is paged_decode:
        arguments = (*arguments[:4], arguments[5])
    out = jax.jit(partial(function, backend=backend))(*arguments)
    assert out.dtype == jnp.dtype(dtype)
    real = slice(0, batch.query_offsets[-1])
    close(out[real], batch.expected()[0][real], dtype)


@pytest.mark.parametrize(("backend", "dtype"), every_type(*FAST))
def test_denoise(backend, dtype):
    """An image would miss some of its context or of itself, or see another branch, in stage 1's call.

    Blocks that see all of themselves over contexts of several lengths, one of them empty, one block padded, one row all
    padding.
    """
    batch = draw_blocks(5, [33, 0, 16, 40], [21, 21, 9, 0], 21, dtype=dtype, **sizes_of(backend))
    check(backend, batch, dtype, paged_blocks)


@pytest.mark.parametrize("backend", ["xla", slow("tpu-interpret")])
def test_blocks_of_several_tiles(backend):
    """A block that is cut into tiles, the last one padded, would be put together in another order."""
    check(backend, draw_blocks(6, [130, 0, 5], [300, 300, 300], 300, heads=28, kv_heads=4), function=paged_blocks)
