"""Ragged paged attention: the way in. Cuts queries into the tiles that a backend wants.

The mask is one integer a query: a query sees the keys `[0, kv_end)` of its sequence. Text token i has
`kv_end = i + 1`, every token of an image block the block's end. Drawn for two text tokens, a block of three, a text:

    text | image | text
    1 0  | 0 0 0 | 0     kv_end = 1
    1 1  | 0 0 0 | 0     kv_end = 2
    1 1  | 1 1 1 | 0     kv_end = 5
    1 1  | 1 1 1 | 0     kv_end = 5
    1 1  | 1 1 1 | 0     kv_end = 5
    1 1  | 1 1 1 | 1     kv_end = 6

So no length of a sequence is needed beside it: what lies behind the largest `kv_end` is never looked at.

Gradients (in reverse) with respect to queries and pages are computed by XLA, whatever the backend.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from bagel_jax.pallas.paged_attention import gpu, reference, tpu, xla
from bagel_jax.pallas.paged_attention.pages import page_size
from bagel_jax.pallas.paged_attention.tiles import Backend, Tiling, merge, ragged, split, tiles

BACKENDS: dict[str, Backend] = {
    "xla": xla.backend(),
    "tpu": tpu.backend(),
    "gpu": gpu.backend(),
    "tpu-interpret": tpu.backend(interpret=True),
}


def paged_attention(
    q: jax.Array,
    pages: jax.Array,
    layer: jax.Array,
    page_table: jax.Array,
    query_offsets: jax.Array,
    kv_end: jax.Array,
    *,
    backend: str,
    return_lse: bool = False,
):
    """Attention of ragged queries, packed over sequences, over keys and values in pages.

    Args:
        q: `[T, H, E]`, sequence after sequence; H is a multiple of K.
        pages: `[L, P, K, 2, page, E]` (`pages.py`), with the queries' own keys and values in it.
        layer: which layer, scalar int32.
        page_table: `[R, n]` int32, the pages of each sequence in order.
        query_offsets: `[R + 1]` int32; sequence r has the queries `[query_offsets[r], query_offsets[r + 1])`. Queries
            after the last are padding.
        kv_end: `[T]` int32, the whole mask.
        backend: `reference` or one of `BACKENDS`.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        `[T, H, E]` in q's dtype, or with `return_lse` float32 and `[T, H]` float32. A query with `kv_end` 0 gets
        zeros and -inf; padding gets anything finite.
    """
    if backend == "reference":
        ends = jnp.searchsorted(query_offsets[1:], jnp.arange(q.shape[0]), side="right")
        sequence = jnp.minimum(ends, page_table.shape[0] - 1).astype(jnp.int32)
        out, lse = reference.attend(q, pages, layer, page_table, sequence, kv_end)
    else:
        chosen = _backend(backend, q, pages)
        tiling = chosen.prefill_tiling(q, pages, page_table.shape[0])
        cut = ragged(query_offsets, q.shape[0], tiling.block_q)
        padded_q = jnp.pad(q, ((0, 1), (0, 0), (0, 0)))[cut.query]
        padded_end = jnp.pad(kv_end, (0, 1))[cut.query]
        out, lse = _tiled(padded_q, pages, layer, page_table, cut.sequence, padded_end, tiling, chosen.attend)
        out, lse = out[cut.tile, cut.slot], lse[cut.tile, cut.slot]
    return _finish(q, out, lse, kv_end, return_lse)


def paged_blocks(
    q: jax.Array,
    pages: jax.Array,
    layer: jax.Array,
    page_table: jax.Array,
    kv_end: jax.Array,
    *,
    backend: str,
    return_lse: bool = False,
):
    """`paged_attention` for as many queries of each sequence, which all see the same: nothing has to be gathered.

    Args:
        q: `[R, N, H, E]`.
        pages, layer, page_table: see `paged_attention`.
        kv_end: `[R]` int32, of all queries of a sequence.
        backend, return_lse: see `paged_attention`.

    Returns:
        `[R, N, H, E]` in q's dtype, or with `return_lse` float32 and `[R, N, H]` float32.
    """
    rows, count, heads, width = q.shape
    if backend == "reference":
        sequence = jnp.repeat(jnp.arange(rows, dtype=jnp.int32), count)
        flat = q.reshape(-1, heads, width)
        out, lse = reference.attend(flat, pages, layer, page_table, sequence, kv_end[sequence])
        out, lse = out.reshape(rows, count, heads, -1), lse.reshape(rows, count, heads)
    else:
        flat = jax.ShapeDtypeStruct((rows * count, heads, width), q.dtype)
        chosen = _backend(backend, flat, pages)
        tiling = chosen.decode_tiling(flat, pages) if count == 1 else chosen.prefill_tiling(flat, pages, rows)
        cuts = -(-count // tiling.block_q)
        padded = jnp.pad(q, ((0, 0), (0, cuts * tiling.block_q - count), (0, 0), (0, 0)))
        padded = padded.reshape(rows * cuts, tiling.block_q, heads, width)
        sequence = jnp.repeat(jnp.arange(rows, dtype=jnp.int32), cuts)
        ends = jnp.broadcast_to(kv_end[sequence, None], padded.shape[:2])
        out, lse = _tiled(padded, pages, layer, page_table, sequence, ends, tiling, chosen.attend)
        out, lse = (x.reshape(rows, -1, *x.shape[2:])[:, :count] for x in (out, lse))
    return _finish(q, out, lse, kv_end[:, None], return_lse)


def paged_decode(q: jax.Array, pages, layer, page_table, kv_end: jax.Array, *, backend: str, return_lse: bool = False):
    """`paged_blocks` for one query a sequence: `q` `[R, H, E]`, `kv_end` `[R]`."""
    out = paged_blocks(q[:, None], pages, layer, page_table, kv_end, backend=backend, return_lse=return_lse)
    return jax.tree.map(lambda x: x[:, 0], out)


def _backend(name: str, q, pages) -> Backend:
    wanted = BACKENDS[name]
    return wanted if wanted.supports(q, pages) else BACKENDS["xla"]


def _tiled(q, pages, layer, page_table, sequence, kv_end, tiling: Tiling, attend):
    """Attention of tiles of queries `[N, block_q, H, E]` with `kv_end` `[N, block_q]`; lse is `[N, block_q, H]`."""
    num_tiles, block_q, heads, width = q.shape
    kv_heads = pages.shape[2]
    groups = heads if tiling.by_head else kv_heads
    a_group = heads // groups  # query heads of a group
    rows = block_q * a_group
    padding = -rows % tiling.rows
    q = q.reshape(num_tiles, block_q, groups, a_group, width).transpose(0, 2, 1, 3, 4)
    q = jnp.pad(q.reshape(num_tiles, groups, rows, width), ((0, 0), (0, 0), (0, padding), (0, 0)))
    ends = jnp.pad(jnp.repeat(kv_end, a_group, axis=1), ((0, 0), (0, padding)))
    what = tiles(sequence, ends)
    if tiling.splits > 1:
        what = split(what, tiling.splits, page_size(pages))
        q = jnp.repeat(q, tiling.splits, axis=0)
    out, lse = _differentiable(attend, q, pages, layer, page_table, what)
    if tiling.splits > 1:
        out, lse = (x.reshape(num_tiles, tiling.splits, *x.shape[1:]) for x in (out, lse))
        out, lse = merge(out.astype(jnp.float32), lse, axis=1)
    out = out[:, :, :rows].reshape(num_tiles, groups, block_q, a_group, width).transpose(0, 2, 1, 3, 4)
    lse = lse[:, :, :rows].reshape(num_tiles, groups, block_q, a_group).transpose(0, 2, 1, 3)
    return out.reshape(num_tiles, block_q, heads, width), lse.reshape(num_tiles, block_q, heads)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(attend, q, pages, layer, page_table, what):
    """A backend's attention of tiles; a kernel has no gradient of its own, nor has a loop of any number of rounds."""
    return attend(q, pages, layer, page_table, what)


def _forward(attend, *arguments):
    out, lse = attend(*arguments)
    return (out, lse), (*arguments, out, lse)


def _backward(attend, saved, cotangents):
    return *xla.gradients(*saved, *cotangents), None, None, None


_differentiable.defvjp(_forward, _backward)


def _finish(q, out, lse, kv_end, return_lse):
    sees = kv_end[..., None] > 0
    out = jnp.where(sees[..., None], out, 0)
    if not return_lse:
        return out.astype(q.dtype)
    return out.astype(jnp.float32), jnp.where(sees, lse, -jnp.inf)
