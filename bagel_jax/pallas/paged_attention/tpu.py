"""Attention of tiles on a TPU (Mosaic).

One grid step is one tile, and steps run in order. Blocks of pages come from HBM into one of two slots while the block
in the other is computed; behind a tile's last block comes the first of the next tile, so that short contexts hide each
other's latency too.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bagel_jax.pallas.paged_attention.pages import page_size
from bagel_jax.pallas.paged_attention.tiles import Backend, Tiles, Tiling

_LANES = 128
_LOW = float(jnp.finfo(jnp.float32).min)
# Elements of the queries of a tile, and of the keys of a block: as many as keep VMEM below the limit.
_TILE = _BLOCK = 2**18
_VMEM = 32 * 2**20


def backend(interpret=False) -> Backend:
    """The TPU kernel as a backend.

    Args:
        interpret: False to compile; True, or `pltpu.InterpretParams`, to run on any platform, slowly.
    """
    return Backend(
        partial(_supports, interpret=interpret),
        lambda q, pages, num_sequences: Tiling(_block_q(q), rows=_sublanes(q)),
        lambda q, pages: Tiling(1, rows=_sublanes(q)),
        partial(attend_tiles, interpret=interpret),
    )


def attend_tiles(q, pages, layer, page_table, tiles: Tiles, *, interpret=False) -> tuple[jax.Array, jax.Array]:
    """See `tiles.Backend.attend`; J = K, and the output is in q's dtype."""
    num_tiles, kv_heads, rows, width = q.shape
    size, keys = page_size(pages), _block_keys(pages, interpret)
    stats = pltpu.VMEM((kv_heads, rows, _LANES), jnp.float32)
    # One more tile, which is empty, so that each has a next one.
    sequence, start, stop, full = (jnp.pad(x, (0, 1)) for x in tiles[:4])

    def a_tile(*shape):
        return pl.BlockSpec((None, *shape), lambda i, *_: (i, *[0] * len(shape)))

    return pl.pallas_call(
        partial(_kernel, table_width=page_table.shape[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(num_tiles,),
            in_specs=[a_tile(1, rows), a_tile(kv_heads, rows, width), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[a_tile(kv_heads, rows, width), a_tile(kv_heads, rows)],
            scratch_shapes=[
                pltpu.VMEM((2, kv_heads, 2, keys // size, size, width), pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((kv_heads, rows, width), jnp.float32),
                stats,
                stats,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM),
        interpret=interpret,
        name="paged_attention",
    )(layer.reshape(1), page_table.reshape(-1), sequence, start, stop, full, tiles.kv_end[:, None], q, pages)


def _kernel(
    layer,  # SMEM [1]
    table,  # SMEM [R n]
    sequence,  # SMEM [N + 1], as are start, stop and full
    start,
    stop,
    full,
    kv_end,  # VMEM [1, M]
    q,  # VMEM [K, M, E]
    pages,  # HBM [L, P, K, 2, page, E]
    out,  # VMEM [K, M, E]
    lse,  # VMEM [K, M]
    buffer,  # VMEM [2, K, 2, pages of a block, page, E]
    arrived,  # DMA semaphore of each slot
    slot,  # SMEM [1], where the next block to compute is
    weighted,  # VMEM [K, M, E], sum of the weighted values
    highest,  # VMEM [K, M, 128], the same in all lanes, as is total
    total,
    *,
    table_width: int,
):
    tile = pl.program_id(0)
    kv_heads, rows, width = q.shape
    a_block, size = buffer.shape[3:5]
    keys = a_block * size
    num_blocks = _ceil(jnp.maximum(stop[tile] - start[tile], 0), keys)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dot = partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def each_copy(tile, block, slot, act):
        """Does something to the copy of each page of a block that lies before the tile's `stop`."""
        first = jax.lax.div(start[tile], size) + block * a_block

        def one(i, _):
            number = table[sequence[tile] * table_width + first + i]
            act(pltpu.make_async_copy(pages.at[layer[0], number], buffer.at[slot, :, :, i], arrived.at[slot]))

        jax.lax.fori_loop(0, jnp.clip(_ceil(stop[tile], size) - first, 0, a_block), one, None)

    def fetch(tile, block, slot):
        each_copy(tile, block, slot, lambda copy: copy.start())

    @pl.when(tile == 0)
    def _():
        slot[0] = 0
        fetch(tile, 0, 0)

    def compute(here, first, *, masked):
        if masked:
            place = first + jax.lax.broadcasted_iota(jnp.int32, (rows, keys), 1)
            ends = jnp.broadcast_to(kv_end[...], (_LANES, rows)).T
            seen = place < _to_width(ends, keys)
            live = first + jax.lax.broadcasted_iota(jnp.int32, (keys, width), 0) < stop[tile]
        for head in range(kv_heads):
            k, v = (buffer[here, head, i].reshape(keys, width) for i in range(2))
            scores = dot(q[head], k, (((1,), (1,)), ((), ()))) * width**-0.5
            if masked:
                scores = jnp.where(seen, scores, _LOW)
                v = jnp.where(live, v, 0)  # it may be NaN there, and 0 * NaN is NaN
            lower = highest[head]
            higher = jnp.maximum(lower, scores.max(axis=1, keepdims=True))
            weights = jnp.exp(scores - _to_width(higher, keys))
            if masked:
                weights = jnp.where(seen, weights, 0.0)
            shrink = jnp.exp(lower - higher)
            highest[head] = higher
            total[head] = total[head] * shrink + weights.sum(axis=1, keepdims=True)
            more = dot(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())))
            weighted[head] = weighted[head] * _to_width(shrink, width) + more

    def step(block, _):
        here = slot[0]
        is_last = block + 1 == num_blocks
        fetch(jnp.where(is_last, tile + 1, tile), jnp.where(is_last, 0, block + 1), 1 - here)
        each_copy(tile, block, here, lambda copy: copy.wait())
        first = start[tile] + block * keys
        needs_mask = first + keys > full[tile]
        pl.when(needs_mask)(partial(compute, here, first, masked=True))
        pl.when(~needs_mask)(partial(compute, here, first, masked=False))
        slot[0] = 1 - here

    @pl.when(num_blocks > 0)
    def _():
        highest[...] = jnp.full(highest.shape, _LOW)
        total[...] = jnp.zeros(total.shape)
        weighted[...] = jnp.zeros(weighted.shape)
        jax.lax.fori_loop(0, num_blocks, step, None)
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, _LANES), 1)
        by_lane = jnp.zeros((rows, _LANES))
        for head in range(kv_heads):
            empty = total[head] == 0
            divisor = jnp.where(empty, 1.0, total[head])
            out[head] = (weighted[head] / _to_width(divisor, width)).astype(out.dtype)
            by_lane = jnp.where(lane == head, jnp.where(empty, -jnp.inf, highest[head] + jnp.log(divisor)), by_lane)
        lse[...] = by_lane.T[:kv_heads]

    @pl.when(num_blocks == 0)
    def _():
        out[...] = jnp.zeros(out.shape, out.dtype)
        lse[...] = jnp.full(lse.shape, -jnp.inf)
        fetch(tile + 1, 0, slot[0])


def _supports(q, pages, *, interpret) -> bool:
    kv_heads, _, size, width = pages.shape[2:]
    shapes = kv_heads <= _LANES and _block_keys(pages, interpret) % size == 0 and size % _sublanes(q) == 0
    widths = width % _LANES == 0 or width in (16, 32, 64)
    dtypes = q.dtype == pages.dtype and q.dtype in (jnp.float32, jnp.bfloat16)
    return shapes and widths and dtypes


def _block_q(q) -> int:
    return max(16, min(64, _TILE // (q.shape[1] * q.shape[2]) // 16 * 16))


def _block_keys(pages, interpret) -> int:
    if interpret:
        return _LANES  # what is interpreted is short, and is to have several blocks all the same
    return max(_LANES, min(512, _BLOCK // (pages.shape[2] * pages.shape[5]) // _LANES * _LANES))


def _sublanes(x) -> int:
    return 32 // x.dtype.itemsize


def _ceil(x, divisor: int):
    return jax.lax.div(x + divisor - 1, divisor)


def _to_width(x, width: int):
    """`[M, 128]`, the same in all lanes, as `[M, width]`, free of cost."""
    return x[:, :width] if width < _LANES else jnp.concatenate([x] * (width // _LANES), axis=1)
