"""Attention of tiles on Hopper GPUs, with Pallas Mosaic GPU.

A block of threads computes one tile for one group of heads. One of its warpgroups copies keys and values page by page
into rings in shared memory; the others take 64 rows of queries each, multiply from there on the tensor cores, and keep
the softmax, which runs along with the keys, in registers. As in FlashAttention-3, two such warpgroups take turns, so
that one multiplies while the other takes exponentials.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from bagel_jax.pallas.paged_attention.pages import page_size
from bagel_jax.pallas.paged_attention.tiles import Backend, Tiles, Tiling

_ROWS = 64  # of a matrix product of one warpgroup
_PROCESSORS = 132  # of an H100 or H200
_LOW = -1e30  # a maximum of nothing: finite, so that a difference of two is not NaN


class _Plan(NamedTuple):
    """How a block of threads goes about its tile; shared memory bounds `block * stages`."""

    warpgroups: int  # that compute
    block: int  # keys at a time
    stages: int  # blocks of keys in shared memory


_PREFILL = _Plan(warpgroups=2, block=128, stages=2)
_DECODE = _Plan(warpgroups=1, block=64, stages=5)


def backend(interpret=False) -> Backend:
    """Mosaic GPU as a backend; `interpret` is what `plgpu.kernel` takes by that name."""
    return Backend(supports, _prefill_tiling, _decode_tiling, partial(attend, interpret=interpret or None))


def supports(q, pages) -> bool:
    """16-bit types (the tensor cores would round float32 to 10 bits), E of 64 or 128, pages of 16 to 128."""
    return (
        q.dtype == pages.dtype
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] in (64, 128)
        and page_size(pages) in (16, 32, 64, 128)
        and q.shape[-2] <= _ROWS * pages.shape[2]
    )


def _prefill_tiling(q, pages, num_sequences) -> Tiling:
    return Tiling(_PREFILL.warpgroups * _ROWS, by_head=True)


def _decode_tiling(q, pages) -> Tiling:
    # The fewest rows that can be copied. A warpgroup multiplies 64 all the same: time goes into reading keys.
    return Tiling(1, rows=8, splits=max(1, _PROCESSORS // (q.shape[0] * pages.shape[2])))


def attend(q, pages, layer, page_table, tiles: Tiles, *, interpret=None, plan: _Plan | None = None):
    """See `tiles.Backend.attend`; the output is float32 for one query a tile, which may be split, else of q's dtype."""
    from jax.experimental.pallas import mosaic_gpu as plgpu  # late: half a second, wanted on these GPUs alone

    num_tiles, groups, rows, width = q.shape
    _, num_pages, kv_heads, _, page, _ = pages.shape
    plan = plan or (_PREFILL if rows == _PREFILL.warpgroups * _ROWS else _DECODE)
    held = (plan.warpgroups, _ROWS)
    dtype = q.dtype if plan.warpgroups > 1 else jnp.float32

    def shared(*shape, width=width, dtype=q.dtype):
        line = 128 // jnp.dtype(dtype).itemsize
        transforms = plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(128)
        return plgpu.SMEM((*shape, width), dtype, transforms=transforms)

    def ready(copies, number=plan.stages):
        return plgpu.Barrier(num_arrivals=copies, num_barriers=number)

    copies = max(1, plan.block // page)
    kernel = plgpu.kernel(
        partial(_kernel, plan, kv_heads, bool(interpret)),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ),
        scratch_types={
            "q_smem": shared(*held),
            # What shared memory has no room for twice takes the place of the queries.
            "out_smem": None if dtype == q.dtype else shared(*held, dtype=dtype),
            "lse_smem": plgpu.SMEM(held, jnp.float32),
            "end_smem": plgpu.SMEM(held, jnp.int32),
            "k_smem": shared(plan.stages, plan.block),
            "v_smem": shared(plan.stages, plan.block),
            "weights_smem": shared(*held, width=plan.block) if interpret else None,
            "q_ready": ready(2, plan.warpgroups),
            "k_ready": ready(copies),
            "v_ready": ready(copies),
            "k_free": ready(plan.warpgroups),
            "v_free": ready(plan.warpgroups),
            "turn": plgpu.Barrier(num_arrivals=plan.warpgroups),
        },
        grid=(groups, num_tiles),
        grid_names=("group", "tile"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # The default differs between versions of JAX.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )
    # Keys and values of each head of each page in one row: the copy engine counts five dimensions, tiling included.
    flat_pages = pages.reshape(-1, page, width)
    row = (layer * num_pages + page_table) * (2 * kv_heads)
    scalars = jnp.stack(tiles[:4], axis=1)
    kv_end = jnp.pad(tiles.kv_end, ((0, 0), (0, math.prod(held) - rows)))
    return kernel(q, flat_pages, row.astype(jnp.int32), scalars, kv_end)


def _kernel(
    plan, kv_heads, interpret, q, pages, row, scalars, kv_end, out, lse, *,
    q_smem, out_smem, lse_smem, end_smem, k_smem, v_smem, weights_smem, q_ready, k_ready, v_ready, k_free, v_free, turn,
):  # fmt: skip
    """One tile for one group of heads.

    q, out `[N, J, M, E]`, pages `[L P K 2, page, E]`, row `[R, n]` where a page begins in them, scalars `[N, 4]`,
    kv_end `[N, 64 warpgroups]`, lse `[N, J, M]`, all in GPU memory.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu  # late: as in `attend`

    _, groups, rows, width = q.shape
    page = pages.shape[1]
    tile, group, warpgroup = (lax.axis_index(name) for name in ("tile", "group", "warpgroup"))
    sequence, start, stop, full = (scalars[tile, i] for i in range(4))
    num_blocks = lax.div(jnp.maximum(stop - start, 0) + (plan.block - 1), plan.block)

    @pl.when(warpgroup == plan.warpgroups)
    def load():
        if plan.warpgroups > 1:
            plgpu.set_max_registers(40, action="decrease")
        head = lax.div(group, groups // kv_heads)
        a_copy = min(page, plan.block)
        last = stop - 1

        @pl.loop(0, num_blocks)
        def _(block):
            slot = lax.rem(block, plan.stages)
            sources = []
            for i in range(plan.block // a_copy):
                # Behind the last page the table may hold anything; what is copied in place of that is masked.
                place = jnp.minimum(start + block * plan.block + i * a_copy, last)
                number = row[sequence, lax.div(place, page)] + 2 * head
                sources.append((number, lax.div(lax.rem(place, page), a_copy) * a_copy))
            for what, (smem, are_ready, are_free) in enumerate(((k_smem, k_ready, k_free), (v_smem, v_ready, v_free))):

                @pl.when(block >= plan.stages)
                def _(are_free=are_free):
                    plgpu.barrier_wait(are_free.at[slot])

                for i, (number, offset) in enumerate(sources):
                    plgpu.copy_gmem_to_smem(
                        pages.at[number + what, pl.ds(offset, a_copy)],
                        smem.at[slot, pl.ds(i * a_copy, a_copy)],
                        are_ready.at[slot],
                    )

    @pl.when(warpgroup < plan.warpgroups)
    def compute():
        if plan.warpgroups > 1:
            plgpu.set_max_registers(232, action="increase")
        a_part = min(rows, _ROWS)
        own = tile, group, pl.ds(warpgroup * _ROWS, a_part)
        q_mine = q_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[own], q_mine.at[pl.ds(0, a_part)], q_ready.at[warpgroup])
        ends = kv_end.at[tile, pl.ds(warpgroup * _ROWS, _ROWS)]
        plgpu.copy_gmem_to_smem(ends, end_smem.at[warpgroup], q_ready.at[warpgroup])
        plgpu.barrier_wait(q_ready.at[warpgroup])

        def wide(x):
            return plgpu.layout_cast(x, plgpu.Layout.WGMMA)

        def tall(x):
            return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))

        def places(shape, axis):
            return wide(lax.broadcasted_iota(jnp.int32, shape, axis))

        end = tall(end_smem[warpgroup])
        scale = width**-0.5 * math.log2(math.e)  # exp2 is cheaper than exp

        def across(x, columns):
            return lax.broadcast_in_dim(x, (_ROWS, columns), (0,))

        def next_turn():
            if plan.warpgroups > 1:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        def clear(slot, first):
            # 0 * NaN is NaN: where no token lives, values must be zero, not only weights. Warpgroups that do so at the
            # same time write the same.
            for i in range(0, plan.block, _ROWS):
                some = v_smem.at[slot, pl.ds(i, _ROWS)]
                v = wide(some[...])
                some[...] = jnp.where(first + i + places(v.shape, 0) < stop, v, jnp.zeros_like(v))
            plgpu.commit_smem()

        def step(block, carry, masked):
            total, highest, sums = carry
            slot = lax.rem(block, plan.stages)
            first = start + block * plan.block

            def products(scores):
                plgpu.wgmma(scores, q_mine, k_smem.at[slot].transpose((1, 0)))
                next_turn()
                return scores[...]

            plgpu.barrier_wait(k_ready.at[slot])
            scores = pl.run_scoped(products, plgpu.ACC((_ROWS, plan.block), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                scores = jnp.where(first + places(scores.shape, 1) < across(end, plan.block), scores, -jnp.inf)
            higher = jnp.maximum(highest, scores.max(axis=1) * scale)
            shrink = jnp.exp2(highest - higher)
            weights = jnp.exp2(scores * scale - across(higher, plan.block))
            sums = sums * shrink + weights.sum(axis=1)
            weights = weights.astype(q.dtype)
            if plan.warpgroups > 1:
                higher, sums, weights = lax.optimization_barrier((higher, sums, weights))
                plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            if plan.warpgroups > 1:
                plgpu.barrier_wait(turn)
            if masked:
                pl.when(first + plan.block > stop)(lambda: clear(slot, first))

            if interpret:  # it takes no operand from registers
                weights_smem[warpgroup] = weights
                weights = weights_smem.at[warpgroup]

            def weighted(values):
                plgpu.wgmma(values, weights, v_smem.at[slot])
                return values[...]

            values = pl.run_scoped(weighted, plgpu.ACC((_ROWS, width), jnp.float32))
            plgpu.barrier_arrive(v_free.at[slot])
            return total * across(shrink, width) + values, higher, sums

        carry = (
            wide(jnp.zeros((_ROWS, width), jnp.float32)),
            tall(jnp.full((_ROWS,), _LOW, jnp.float32)),
            tall(jnp.zeros((_ROWS,), jnp.float32)),
        )
        num_full = lax.div(jnp.maximum(full - start, 0), plan.block)
        pl.when(warpgroup == 1)(next_turn)
        carry = lax.fori_loop(0, num_full, partial(step, masked=False), carry)
        total, highest, sums = lax.fori_loop(num_full, num_blocks, partial(step, masked=True), carry)
        pl.when(warpgroup == 0)(next_turn)

        some = sums > 0
        safe = jnp.where(some, sums, 1.0)
        out_mine = (q_smem if out_smem is None else out_smem).at[warpgroup]
        out_mine[...] = (total / across(safe, width)).astype(out.dtype)
        lse_smem[warpgroup] = jnp.where(some, highest * math.log(2) + jnp.log(safe), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_mine.at[pl.ds(0, a_part)], out.at[own])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup, pl.ds(0, a_part)], lse.at[own])
        plgpu.wait_smem_to_gmem(0)
