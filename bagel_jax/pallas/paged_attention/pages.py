"""The layout of KV pages, which is this file's alone to know.

Pages are one array `[L, P, K, 2, page, E]`: for each layer and page, for each KV head its keys and then its values.
The keys of a head are contiguous rows of width E, as a matrix unit wants them, in tiles that neither a TPU nor the
copy engine of a Hopper GPU has to rearrange; and all heads of a page are one contiguous copy. Page 0 belongs to
nobody: what must be written somewhere but is nobody's goes there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def empty_pages(
    num_layers: int, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, dtype, sharding=None
) -> jax.Array:
    """Pages of zeros, `[L, P, K, 2, page, E]`, made where a sharding says."""
    return jnp.zeros((num_layers, num_pages, num_kv_heads, 2, page_size, head_dim), dtype, device=sharding)


def page_size(pages: jax.Array) -> int:
    """Tokens a page."""
    return pages.shape[4]


def write(pages: jax.Array, layer: jax.Array, page: jax.Array, slot: jax.Array, k: jax.Array, v: jax.Array):
    """Pages with keys and values of T tokens in their places.

    Args:
        pages: `[L, P, K, 2, page, E]`.
        layer: which layer, a scalar.
        page, slot: `[T]` int32, each token's page and its place in it.
        k, v: `[T, K, E]`.
    """
    # Everything but E is indexed: with larger windows XLA gives the pool another layout on a TPU, and copies all of it
    # in every layer.
    head, which = jnp.arange(pages.shape[2])[:, None], jnp.arange(2)
    kv = jnp.stack([k, v], axis=2).astype(pages.dtype)
    return pages.at[layer, page[:, None, None], head, which, slot[:, None, None]].set(kv)


def read(pages: jax.Array, layer: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the pages `numbers` `[N, n]` of one layer, each `[N, K, n page, E]`."""
    head = jnp.arange(pages.shape[2])[None, :, None]
    kv = (pages[layer, numbers[:, None], head, which] for which in (0, 1))
    k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in kv)
    return k, v


def add(pages: jax.Array, layer: jax.Array, numbers: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Pages with `k` and `v` `[N, K, n page, E]` added to those that `read` reads them from."""
    head = jnp.arange(pages.shape[2])[None, :, None]
    for which, x in enumerate((k, v)):
        x = x.reshape(*x.shape[:2], numbers.shape[1], -1, x.shape[-1])
        pages = pages.at[layer, numbers[:, None], head, which].add(x.astype(pages.dtype))
    return pages


def take_pages(pages: jax.Array, numbers: jax.Array) -> jax.Array:
    """The pages `numbers` `[n]` in all layers, `[L, n, K, 2, page, E]`."""
    return pages[:, numbers]


def put_pages(pages: jax.Array, numbers: jax.Array, others: jax.Array) -> jax.Array:
    """Pages with those numbered `numbers` `[n]` replaced by `others` `[L, n, K, 2, page, E]`, in all layers."""
    return pages.at[:, numbers].set(others)


def copy_pages(pages: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Pages with those numbered `target` `[n]` replaced by what `source` `[n]` hold, in all layers."""
    return put_pages(pages, target, take_pages(pages, source))


def to_dense(pages: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the pages `numbers` `[n]`, each `[L, n page, K, E]`."""
    kv = pages[:, numbers].transpose(3, 0, 1, 4, 2, 5)  # [2, L, n, page, K, E]
    kv = kv.reshape(2, kv.shape[1], -1, *kv.shape[4:])
    return kv[0], kv[1]
