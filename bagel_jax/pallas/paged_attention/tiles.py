"""From ragged queries to tiles of equal shape, and back. What backends compute is attention of tiles.

A tile is some queries of one sequence for each group of heads. Tiles are independent of each other, so that the keys
of a long context may be split among several tiles of the same queries, whose results `merge` joins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiling(NamedTuple):
    """How a backend wants its tiles."""

    block_q: int  # queries of a tile
    by_head: bool = False  # a group is one query head (J = H), not all heads that share keys (J = K)
    rows: int = 1  # M is padded to a multiple of this
    splits: int = 1  # tiles that share the keys of one tile of queries


class Backend(NamedTuple):
    """One way to compute attention of tiles. What it does not support, XLA does."""

    # supports(q [T, H, E], pages): by shape, dtype and head width.
    supports: Callable[[jax.Array, jax.Array], bool]
    # For ragged queries, called with q, pages and the number of sequences, and for one query a sequence.
    prefill_tiling: Callable[[jax.Array, jax.Array, int], Tiling]
    decode_tiling: Callable[[jax.Array, jax.Array], Tiling]
    # attend(q [N, J, M, E], pages [L, P, K, 2, page, E], layer, page_table [R, n], tiles) -> [N, J, M, E] float32 or
    # q's dtype, and the log-sum-exp of the scores [N, J, M] float32. A tile with nothing to do gives zeros and -inf, a
    # row with kv_end 0 in another anything finite.
    attend: Callable[..., tuple[jax.Array, jax.Array]]


class Tiles(NamedTuple):
    """What each of N tiles looks at. M is the number of its queries times the query heads a group.

    A row sees the keys from `start` to its `kv_end`. Blocks of keys from `stop` on are skipped, those before `full`
    need no mask.
    """

    sequence: jax.Array  # [N] int32, row of the page table
    start: jax.Array  # [N] int32, first key, a multiple of the page size
    stop: jax.Array  # [N] int32, the largest kv_end of the tile; at most `start`: nothing to do
    full: jax.Array  # [N] int32, the smallest kv_end of the tile's real queries
    kv_end: jax.Array  # [N, M] int32; 0 for rows that are padding


class Ragged(NamedTuple):
    """Where queries packed over sequences lie among tiles."""

    sequence: jax.Array  # [N]
    query: jax.Array  # [N, block_q] int32, a tile's queries; T where there is none
    tile: jax.Array  # [T], a query's tile
    slot: jax.Array  # [T], its place in there


def ragged(query_offsets: jax.Array, num_queries: int, block_q: int) -> Ragged:
    """Cuts R sequences' queries into tiles of `block_q`.

    Args:
        query_offsets: `[R + 1]` int32; sequence r has the queries `[query_offsets[r], query_offsets[r + 1])`.
        num_queries: T.
        block_q: queries a tile.

    Returns:
        N = T // block_q + R tiles, of which the last ones may be empty.
    """
    num_sequences = query_offsets.shape[0] - 1
    tiles_of = -(-jnp.diff(query_offsets) // block_q)
    tile_offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(tiles_of)]).astype(jnp.int32)

    def owner(offsets, i):
        return jnp.clip(jnp.searchsorted(offsets, i, side="right") - 1, 0, num_sequences - 1).astype(jnp.int32)

    tile = jnp.arange(num_queries // block_q + num_sequences, dtype=jnp.int32)
    sequence = owner(tile_offsets, tile)
    first = query_offsets[sequence] + (tile - tile_offsets[sequence]) * block_q
    query = first[:, None] + jnp.arange(block_q, dtype=jnp.int32)
    query = jnp.where(query < query_offsets[sequence + 1][:, None], query, num_queries)

    token = jnp.arange(num_queries, dtype=jnp.int32)
    of_token = owner(query_offsets, token)
    place = token - query_offsets[of_token]
    in_tiles = jnp.minimum(tile_offsets[of_token] + place // block_q, tile.shape[0] - 1)
    return Ragged(sequence, query, in_tiles, place % block_q)


def tiles(sequence: jax.Array, kv_end: jax.Array, start: jax.Array | int = 0) -> Tiles:
    """`Tiles` from each tile's sequence `[N]`, `kv_end` of its rows `[N, M]`, and where its keys start."""
    real = jnp.where(kv_end > 0, kv_end, jnp.iinfo(jnp.int32).max).min(axis=1)
    stop = kv_end.max(axis=1)
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), stop.shape)
    return Tiles(sequence, start, stop, jnp.minimum(real, stop), kv_end)


def split(one: Tiles, splits: int, page_size: int) -> Tiles:
    """Each of N tiles as `splits` ones, tile i's at `[i splits, (i + 1) splits)`, with a part of its keys each."""
    share = -(-one.stop // (splits * page_size)) * page_size
    start = share[:, None] * jnp.arange(splits, dtype=jnp.int32)
    end = (start + share[:, None]).reshape(-1)
    many = Tiles(*(jnp.repeat(x, splits, axis=0) for x in one))
    return Tiles(
        many.sequence,
        start.reshape(-1),
        jnp.minimum(many.stop, end),
        jnp.minimum(many.full, end),
        jnp.minimum(many.kv_end, end[:, None]),
    )


def merge(out: jax.Array, lse: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Joins attention over disjoint sets of keys.

    Args:
        out: `[..., E]` float32, results over each set along `axis`.
        lse: `[...]` float32, log-sum-exps of the scores; -inf where there was no key.
        axis: the axis to join over, counted from the front.

    Returns:
        The same without that axis; zero and -inf where no set had a key.
    """
    highest = lse.max(axis=axis, keepdims=True)
    weight = jnp.where(lse == -jnp.inf, 0.0, jnp.exp(lse - jnp.where(highest == -jnp.inf, 0.0, highest)))
    total = weight.sum(axis=axis)
    out = (out * weight[..., None]).sum(axis=axis) / jnp.where(total == 0, 1.0, total)[..., None]
    return out, jnp.squeeze(highest, axis) + jnp.log(total)
