"""Attention over a read-only prefix and the keys of the call itself, under prefix-bidirectional masks.

The mask is one integer a query: a query sees the whole prefix and the call's own keys `[0, kv_end)`. Drawn for a
prefix of 3 keys, two text tokens and an image block of three (1 = seen):

    prefix | text | image
    1 1 1  | 1 0  | 0 0 0     kv_end = 1
    1 1 1  | 1 1  | 0 0 0     kv_end = 2
    1 1 1  | 1 1  | 1 1 1     kv_end = 5
    1 1 1  | 1 1  | 1 1 1     kv_end = 5
    1 1 1  | 1 1  | 1 1 1     kv_end = 5
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bagel_jax.models.layers import precision

# Scores larger than this are computed for a slice of the queries at a time, so that a 1024² picture's
# 28 x 4098 x 9000 scores never exist at once.
_MAX_SCORES = 2**26


class KV(NamedTuple):
    """Keys (after norm and RoPE) and values, `[..., S, K, E]`; a cache has the layers L in front."""

    k: jax.Array
    v: jax.Array


def attend(q: jax.Array, fresh: KV, kv_end: jax.Array, prefix: KV | None = None, prefix_len=0) -> jax.Array:
    """Softmax attention, scores and accumulation in float32.

    Args:
        q: queries `[T, H, E]`, H a multiple of K.
        fresh: keys and values of the call itself, `[T', K, E]`.
        kv_end: `[T]` int32, how many of `fresh` each query sees.
        prefix: keys and values that every query sees, `[S, K, E]`, or None.
        prefix_len: how many of the S are real, a traced scalar.

    Returns:
        `[T, H, E]` in q's dtype. A query that sees no key at all (padding) gets finite rubbish.
    """
    num_queries = q.shape[0]
    num_keys = fresh.k.shape[0] + (0 if prefix is None else prefix.k.shape[0])
    rows = max(1, _MAX_SCORES // (q.shape[1] * num_keys))
    if rows >= num_queries:
        return _attend(q, fresh, kv_end, prefix, prefix_len)

    chunks = -(-num_queries // rows)
    rows = -(-num_queries // chunks)
    padding = chunks * rows - num_queries
    q = jnp.pad(q, ((0, padding), (0, 0), (0, 0))).reshape(chunks, rows, *q.shape[1:])
    kv_end = jnp.pad(kv_end, (0, padding)).reshape(chunks, rows)
    out = jax.lax.map(lambda chunk: _attend(chunk[0], fresh, chunk[1], prefix, prefix_len), (q, kv_end))
    return out.reshape(chunks * rows, *out.shape[2:])[:num_queries]


def _attend(q, fresh, kv_end, prefix, prefix_len):
    """`attend` with all scores at once."""
    num_queries, heads, width = q.shape
    kv_heads = fresh.k.shape[1]
    grouped = q.reshape(num_queries, kv_heads, heads // kv_heads, width)

    def scores(keys, seen):
        s = jnp.einsum(
            "tkge,ske->kgts", grouped, keys, precision=precision(q.dtype), preferred_element_type=jnp.float32
        )
        return jnp.where(seen, s * width**-0.5, jnp.finfo(jnp.float32).min)

    def weighted(weights, values):
        return jnp.einsum(
            "kgts,ske->tkge",
            weights.astype(values.dtype),
            values,
            precision=precision(q.dtype),
            preferred_element_type=jnp.float32,
        )

    s = scores(fresh.k, jnp.arange(fresh.k.shape[0]) < kv_end[:, None])
    if prefix is None:
        out = weighted(jax.nn.softmax(s), fresh.v)
    else:
        past = prefix.k.shape[0]
        s = jnp.concatenate([scores(prefix.k, jnp.arange(past) < prefix_len), s], axis=-1)
        weights = jax.nn.softmax(s)
        out = weighted(weights[..., :past], prefix.v) + weighted(weights[..., past:], fresh.v)
    return out.reshape(num_queries, heads, width).astype(q.dtype)
