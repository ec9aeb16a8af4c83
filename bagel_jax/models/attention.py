"""Attention among the tokens of a call, with nothing in pages: that of the ViT, the autoencoder and training.

Over a KV cache it is `pallas/paged_attention` that attends.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bagel_jax.layout import PackedMask
from bagel_jax.models.layers import precision


class KV(NamedTuple):
    """Keys (after norm and RoPE) and values, `[..., S, K, E]`; a cache has the layers L in front."""

    k: jax.Array
    v: jax.Array


def attend(q: jax.Array, kv: KV, kv_end: jax.Array) -> jax.Array:
    """Softmax attention, scores and accumulation in float32.

    Args:
        q: queries `[T, H, E]`, H a multiple of K.
        kv: keys and values `[S, K, E]`.
        kv_end: `[T]` int32, how many of the keys each query sees.

    Returns:
        `[T, H, E]` in q's dtype. A query that sees no key at all (padding) gets finite rubbish.
    """
    return _sliced(lambda q, end: _attend(q, kv, jnp.arange(kv.k.shape[0]) < end[:, None]), q, kv_end, kv.k.shape[0])


def attend_some(q: jax.Array, kv: KV, seen: jax.Array) -> jax.Array:
    """`attend` where every query sees the same keys, wherever they are.

    Args:
        q: queries `[T, H, E]`, H a multiple of K.
        kv: keys and values `[S, K, E]`, finite.
        seen: `[S]` bool, at least one of them set.

    Returns:
        `[T, H, E]` in q's dtype.
    """
    return _sliced(lambda q, _: _attend(q, kv, seen), q, (), kv.k.shape[0])


def attend_packed(q: jax.Array, kv: KV, mask: PackedMask) -> jax.Array:
    """Softmax attention among the T tokens of one row that holds several samples.

    Args:
        q: queries `[T, H, E]`.
        kv: keys and values of the same tokens, `[T, K, E]`.
        mask: who sees whom, fields `[T]`.

    Returns:
        `[T, H, E]` in q's dtype.
    """
    return _sliced(lambda q, some: _attend(q, kv, some.seen(mask)), q, mask, kv.k.shape[0])


# More scores than this are computed for a slice of the queries at a time, so that a 1024² image's 28 x 4098 x 9000
# never exist at once. On a CPU a slice should stay in the processor's cache: 1,218 queries over 4,290 keys took 38 ms
# that way, 143 ms in one piece.
_MAX_SCORES = {"cpu": 2**21, "default": 2**26}


def _sliced(function, q, per_query, num_keys):
    """`function(q, per_query)`, for a slice of the queries at a time where all scores at once would be too many."""
    rows = {platform: max(1, limit // (q.shape[1] * num_keys)) for platform, limit in _MAX_SCORES.items()}
    if min(rows.values()) >= q.shape[0]:
        return function(q, per_query)
    # For which platform is known when the program is lowered: the machine that traces it may have another one.
    slices = {platform: partial(_in_slices, function, count) for platform, count in rows.items()}
    return jax.lax.platform_dependent(q, per_query, **slices)


def _in_slices(function, rows, q, per_query):
    num_queries = q.shape[0]
    if rows >= num_queries:
        return function(q, per_query)

    chunks = -(-num_queries // rows)
    rows = -(-num_queries // chunks)

    def cut(x):
        x = jnp.pad(x, ((0, chunks * rows - num_queries), *[(0, 0)] * (x.ndim - 1)))
        return x.reshape(chunks, rows, *x.shape[1:])

    # Under a gradient, the scores are computed again instead of being kept for all slices.
    out = jax.lax.map(jax.checkpoint(lambda chunk: function(*chunk)), jax.tree.map(cut, (q, per_query)))
    return out.reshape(chunks * rows, *out.shape[2:])[:num_queries]


def _attend(q, kv, seen):
    """Attention with all scores at once; `seen` `[T, S]` says which keys each query sees."""
    num_queries, heads, width = q.shape
    kv_heads = kv.k.shape[1]
    grouped = q.reshape(num_queries, kv_heads, heads // kv_heads, width)
    einsum = partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=jnp.float32)

    scores = einsum("tkge,ske->kgts", grouped, kv.k) * width**-0.5
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    # The result does not depend on the maximum, so neither does its gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = einsum("kgts,ske->kgte", weights.astype(kv.v.dtype), kv.v)
    out = (out / weights.sum(axis=-1)[..., None]).transpose(2, 0, 1, 3)
    return out.reshape(num_queries, heads, width).astype(q.dtype)
