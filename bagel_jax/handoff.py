"""What crosses from stage 0 to stage 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from bagel_jax.inputs.plan import View
from bagel_jax.models.attention import KV
from bagel_jax.models.mot import Prefix


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("caches", "length", "rope"),
    meta_fields=("rows", "text_row", "img_row"),
)
@dataclass(frozen=True)
class ContextKV:
    """The context of one request, for every guidance branch that differs from the others.

    Row 0 is the full context. Branches that see the same are one row, and rows that see parts of the same cache
    share it. A pytree: arrays are traced; which row sees which cache, and which row is which branch, are static.
    """

    caches: tuple[KV, ...]  # each [L, S, K, E]
    length: jax.Array  # [R] int32, tokens that a row sees of its cache
    rope: jax.Array  # [R] int32, RoPE position of the row's latent block
    rows: tuple[int, ...]  # the cache that each row sees
    text_row: int  # the row of the branch without the last text
    img_row: int  # the row of the branch without pictures

    def prefix(self, count: int) -> Prefix:
        """What the first `count` rows have behind them."""
        return Prefix(self.caches, self.rows[:count], self.length[:count])


def hand_over(caches: Mapping[int, KV], main: View, text: View, img: View) -> ContextKV:
    """The contexts of the guidance branches, from the caches that they are views of, by number, each `[L, S, K, E]`.

    Branches that see the same become one row.
    """
    views = list(dict.fromkeys((main, text, img)))
    used = sorted({view.cache for view in views})
    return ContextKV(
        caches=tuple(caches[cache] for cache in used),
        length=jnp.asarray([view.length for view in views], jnp.int32),
        rope=jnp.asarray([view.rope for view in views], jnp.int32),
        rows=tuple(used.index(view.cache) for view in views),
        text_row=views.index(text),
        img_row=views.index(img),
    )
