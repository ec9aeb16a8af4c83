"""Attention over pages, one query after another: the truth that the other backends are held to."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bagel_jax.pallas.paged_attention.pages import page_size, to_dense


def attend(q, pages, layer, page_table, sequence, kv_end) -> tuple[jax.Array, jax.Array]:
    """Softmax attention in float32.

    Args:
        q: `[T, H, E]`.
        pages: `[L, P, K, 2, page, E]`.
        layer: scalar int32.
        page_table: `[R, n]` int32.
        sequence: `[T]` int32, each query's row of the page table.
        kv_end: `[T]` int32, each query sees the first so many keys of its sequence.

    Returns:
        `[T, H, E]` and the log-sum-exp of the scores `[T, H]`, float32; zero and -inf for a query that sees nothing.
    """
    heads, width = q.shape[1:]
    num_keys = page_table.shape[1] * page_size(pages)

    def one(query):
        q, sequence, kv_end = query
        k, v = (x[0].astype(jnp.float32) for x in to_dense(pages[layer][None], page_table[sequence]))
        seen = jnp.arange(num_keys) < kv_end
        # What is not seen may be anything, NaN included, and 0 * NaN is NaN.
        k, v = (jnp.where(seen[:, None, None], x, 0.0) for x in (k, v))
        k, v = (jnp.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
        exact = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("he,she->hs", q.astype(jnp.float32), k, precision=exact) * width**-0.5
        scores = jnp.where(seen, scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=1)
        weights = jnp.where(seen, jnp.exp(scores - jnp.where(kv_end > 0, lse, 0.0)[:, None]), 0.0)
        return jnp.einsum("hs,she->he", weights, v, precision=exact), lse

    return jax.lax.map(one, (q, sequence, kv_end))
