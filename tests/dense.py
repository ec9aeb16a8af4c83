"""Attention over keys and values that lie in a row, nothing in pages: what attention over pages must be equal to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.engine.handoff import ContextKV
from bagel_jax.models.attention import KV, attend
from bagel_jax.models.mot import Block, MoT
from bagel_jax.pallas.paged_attention.pages import to_dense


def through(trunk: MoT, x: Block, rope, kv_end, past: KV | None = None) -> tuple[Block, KV]:
    """Tokens of one sequence through the trunk.

    Args:
        trunk: the trunk.
        x: embedded tokens, `und` `[T, D]` and `gen` `[N, D]` or None.
        rope: `[T + N]`.
        kv_end: `[T + N]`, how many of the tokens before them and of the T + N each token sees.
        past: keys and values of the tokens before them, `[L, S, K, E]`.

    Returns:
        The normed hidden states, and the keys and values of all tokens, `[L, S + T + N, K, E]`.
    """
    c = trunk.config
    if past is None:
        past = KV(*(jnp.zeros((c.num_layers, 0, c.num_kv_heads, c.head_dim), x.und.dtype) for _ in range(2)))
    start = past.k.shape[1]

    def attention(layer, q, k, v, cache):
        kv = k.joined(0), v.joined(0)
        cache = KV(*(whole.at[layer, start:].set(own) for whole, own in zip(cache, kv, strict=True)))
        return q.split(attend(q.joined(0), KV(cache.k[layer], cache.v[layer]), kv_end), 0), cache

    cache = KV(*(jnp.pad(whole, ((0, 0), (0, len(rope)), (0, 0), (0, 0))) for whole in past))
    out, cache = trunk(x, rope, attention, cache)
    return trunk.normed(out), cache


def view_of(context: ContextKV, view: int = 0) -> KV:
    """What a view of a context sees, `[L, length, K, E]`."""
    length = int(context.length[view])
    cache = to_dense(context.pages, np.asarray(context.page_table[view]))
    return KV(*jax.tree.map(lambda x: x[:, :length], cache))
