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

import functools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bagel_jax.models.layers import precision


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
    rows = max(1, _max_scores() // (q.shape[1] * num_keys))
    if rows >= num_queries:
        return _attend(q, fresh, kv_end, prefix, prefix_len)

    chunks = -(-num_queries // rows)
    rows = -(-num_queries // chunks)
    padding = chunks * rows - num_queries
    q = jnp.pad(q, ((0, padding), (0, 0), (0, 0))).reshape(chunks, rows, *q.shape[1:])
    kv_end = jnp.pad(kv_end, (0, padding)).reshape(chunks, rows)
    out = jax.lax.map(lambda chunk: _attend(chunk[0], fresh, chunk[1], prefix, prefix_len), (q, kv_end))
    return out.reshape(chunks * rows, *out.shape[2:])[:num_queries]


def _max_scores() -> int:
    """More scores than this are computed for a slice of the queries at a time.

    So a 1024² picture's 28 x 4098 x 9000 scores never exist at once. On a CPU a slice should stay in the processor's
    cache: 1,218 queries over 4,290 keys took 38 ms that way, 143 ms in one piece.
    """
    return 2**21 if jax.default_backend() == "cpu" else 2**26


def _attend(q, fresh, kv_end, prefix, prefix_len):
    """`attend` with all scores at once. Prefix and fresh keys are summed up apart and share one maximum."""
    num_queries, heads, width = q.shape
    kv_heads = fresh.k.shape[1]
    grouped = q.reshape(num_queries, kv_heads, heads // kv_heads, width)
    einsum = partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=jnp.float32)

    def scores(keys, seen):
        s = einsum("tkge,ske->kgts", grouped, keys) * width**-0.5
        return jnp.where(seen, s, jnp.finfo(jnp.float32).min)

    parts = [(fresh, scores(fresh.k, jnp.arange(fresh.k.shape[0]) < kv_end[:, None]))]
    if prefix is not None:
        parts.append((prefix, scores(prefix.k, jnp.arange(prefix.k.shape[0]) < prefix_len)))
    highest = functools.reduce(jnp.maximum, [s.max(axis=-1, keepdims=True) for _, s in parts])
    total = out = 0.0
    for kv, s in parts:
        weights = jnp.exp(s - highest)
        total += weights.sum(axis=-1)
        out += einsum("kgts,ske->kgte", weights.astype(kv.v.dtype), kv.v)
    out = (out / total[..., None]).transpose(2, 0, 1, 3)
    return out.reshape(num_queries, heads, width).astype(q.dtype)
