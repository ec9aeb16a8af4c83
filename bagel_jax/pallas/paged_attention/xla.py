"""Attention of tiles in plain XLA: what runs on a CPU, and anywhere else where no kernel applies.

Blocks of keys are gathered as they are needed, so that the work grows with the contexts that there are, not with the
size of the pool or the width of the page table.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from bagel_jax.pallas.paged_attention.pages import add, page_size, read
from bagel_jax.pallas.paged_attention.tiles import Backend, Tiles, Tiling

_BLOCK = 256  # keys at a time
# Scores over a block of keys are kept in a processor's cache: those of one tile are so many at most, and tiles are
# computed together up to so many.
_SCORES_OF_A_TILE = 3 * 2**18
_SCORES_TOGETHER = 2**18
_LEAST_QUERIES = 64  # of a tile
_LOW = float(jnp.finfo(jnp.float32).min)


def backend() -> Backend:
    """XLA as a backend: it takes everything."""
    return Backend(lambda q, pages: True, _prefill_tiling, lambda q, pages: Tiling(1), attend_tiles)


def _prefill_tiling(q, pages, num_sequences) -> Tiling:
    """All queries of a sequence where all have as many and there is room for their scores: products should be large."""
    share = -(-q.shape[0] // num_sequences)
    cuts = -(-share // max(1, _SCORES_OF_A_TILE // (q.shape[1] * _BLOCK)))
    return Tiling(max(_LEAST_QUERIES, -(-share // cuts)))


def attend_tiles(q, pages, layer, page_table, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """See `tiles.Backend.attend`; J = K, and the output is float32."""
    num_tiles, groups, rows, _ = q.shape
    together = min(num_tiles, max(1, _SCORES_TOGETHER // (groups * rows * _BLOCK)))
    chunks = -(-num_tiles // together)

    def cut(x):
        x = jnp.pad(x, ((0, chunks * together - num_tiles), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(chunks, together, *x.shape[1:])

    some = partial(_attend, pages, layer, page_table)
    out = jax.lax.map(lambda chunk: some(*chunk), jax.tree.map(cut, (q, tiles)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_tiles], out)


def _attend(pages, layer, page_table, q, tiles: Tiles):
    keys, numbers_of = _blocks(pages, page_table)
    scale = q.shape[-1] ** -0.5
    einsum = _einsum(q.dtype)

    def step(block, carry):
        highest, total, out = carry
        k, v = read(pages, layer, numbers_of(block)[tiles.sequence])
        place = block * keys + jnp.arange(keys)
        scores = einsum("nkme,nkse->nkms", q, k)  # not scaled: in the exponents below that costs nothing
        seen = ((place < tiles.kv_end[:, :, None]) & (place >= tiles.start[:, None, None]))[:, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        live = place < tiles.stop[:, None]  # beyond, a page may hold anything, NaN included
        v = jnp.where(live[:, None, :, None], v, 0)
        higher = jnp.maximum(highest, scores.max(axis=-1))  # finite from the beginning
        weights = jnp.exp((scores - higher[..., None]) * scale)
        shrink = jnp.exp((highest - higher) * scale)
        total = total * shrink + weights.sum(axis=-1)
        out = out * shrink[..., None] + einsum("nkms,nkse->nkme", weights.astype(v.dtype), v)
        return higher, total, out

    first, last = tiles.start.min() // keys, -(-tiles.stop.max() // keys)
    rows = q.shape[:-1]
    zero = jnp.full(rows, _LOW), jnp.zeros(rows), jnp.zeros((*rows, q.shape[-1]))
    highest, total, out = jax.lax.fori_loop(first, last, step, zero)
    lse = jnp.where(total == 0, -jnp.inf, highest * scale + jnp.log(total))
    return out / jnp.where(total == 0, 1, total)[..., None], lse


def gradients(q, pages, layer, page_table, tiles: Tiles, out, lse, out_bar, lse_bar) -> tuple[jax.Array, jax.Array]:
    """The gradients of any backend's `attend`, by scores computed again block by block from the log-sum-exp.

    Args:
        q, pages, layer, page_table, tiles: what it was called with.
        out, lse: what it returned.
        out_bar, lse_bar: the gradients with respect to that.

    Returns:
        Those with respect to `q` and `pages`.

    Source: algorithm 4 of Dao, "FlashAttention-2"; the log-sum-exp's own gradient is one more term.
    """
    keys, numbers_of = _blocks(pages, page_table)
    shape, scale = (q.shape[0], pages.shape[2], -1), q.shape[-1] ** -0.5
    a_group = q.shape[1] // pages.shape[2]  # tiles may have a group for each query head
    kv_end = jnp.tile(tiles.kv_end, (1, a_group))[:, None, :, None]
    einsum = _einsum(q.dtype)
    rows, out, out_bar = (x.reshape(*shape, q.shape[-1]).astype(jnp.float32) for x in (q, out, out_bar))
    own = lse_bar.reshape(shape) - (out * out_bar).sum(axis=-1)
    lse = lse.reshape(shape)

    def step(block, carry):
        rows_bar, pages_bar = carry
        numbers = numbers_of(block)[tiles.sequence]
        place = block * keys + jnp.arange(keys)
        live = (place < tiles.stop[:, None])[:, None, :, None]  # beyond, a page may hold anything, NaN included
        k, v = (jnp.where(live, x.astype(jnp.float32), 0) for x in read(pages, layer, numbers))
        seen = (place < kv_end) & (place >= tiles.start[:, None, None, None])
        weights = jnp.where(seen, jnp.exp(einsum("nkme,nkse->nkms", rows, k) * scale - lse[..., None]), 0)
        change = einsum("nkme,nkse->nkms", out_bar, v) + own[..., None]
        scores_bar = jnp.where(seen, weights * change, 0) * scale
        k_bar = einsum("nkms,nkme->nkse", scores_bar, rows)
        v_bar = einsum("nkms,nkme->nkse", weights, out_bar)
        return rows_bar + einsum("nkms,nkse->nkme", scores_bar, k), add(pages_bar, layer, numbers, k_bar, v_bar)

    first, last = tiles.start.min() // keys, -(-tiles.stop.max() // keys)
    zero = jnp.zeros_like(rows), jnp.zeros(pages.shape, jnp.float32)
    rows_bar, pages_bar = jax.lax.fori_loop(first, last, step, zero)
    return rows_bar.reshape(q.shape).astype(q.dtype), pages_bar.astype(pages.dtype)


def _blocks(pages, page_table):
    """Keys of a block, and what gives the pages `[R, n]` of a block by its number."""
    a_block = max(1, _BLOCK // page_size(pages))  # pages
    table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % a_block)))

    def numbers_of(block):
        return jax.lax.dynamic_slice_in_dim(table, block * a_block, a_block, axis=1)

    return a_block * page_size(pages), numbers_of


def _einsum(dtype):
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
