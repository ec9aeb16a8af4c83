"""The SigLIP NaViT: one image of any size, as a row of patches, full attention.

Source: official `modeling/bagel/siglip_navit.py` with `rope=False`, as its `app.py` sets it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from bagel_jax.config import VitConfig
from bagel_jax.layout import PackedMask
from bagel_jax.models.attention import KV, attend, attend_packed
from bagel_jax.models.layers import ACTIVATIONS, layer_norm, linear, scan_layers, stack


class VitLayer(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, c: VitConfig, dtype, rngs: nnx.Rngs):
        self.config = c
        width = c.hidden_size
        self.norm1 = layer_norm(width, c.norm_eps, dtype, rngs)
        self.q, self.k, self.v, self.o = (linear(width, width, dtype, rngs) for _ in range(4))
        self.norm2 = layer_norm(width, c.norm_eps, dtype, rngs)
        self.fc1 = linear(width, c.mlp_width, dtype, rngs)
        self.fc2 = linear(c.mlp_width, width, dtype, rngs)

    def __call__(self, x: jax.Array, attention: Callable[[jax.Array, KV], jax.Array]) -> jax.Array:
        """`[..., T, width]` -> the same shape; `attention` of queries and KV `[..., T, H, E]` knows who sees whom."""
        h = self.norm1(x)
        q, k, v = (p(h).reshape(*h.shape[:-1], self.config.num_heads, -1) for p in (self.q, self.k, self.v))
        x = x + self.o(attention(q, KV(k, v)).reshape(x.shape))
        h = ACTIVATIONS[self.config.activation](self.fc1(self.norm2(x)))
        return x + self.fc2(h)


class SigLIP(nnx.Module):
    """Patch embedding with learned positions, the layers, and `post_layernorm`."""

    def __init__(self, c: VitConfig, dtype, rngs: nnx.Rngs):
        self.patch_embed = linear(c.channels * c.patch_size**2, c.hidden_size, dtype, rngs)
        self.positions = nnx.Embed(c.num_positions, c.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = stack(partial(VitLayer, c, dtype), c.num_layers, rngs)
        self.post_norm = layer_norm(c.hidden_size, c.norm_eps, dtype, rngs)

    def __call__(self, patches: jax.Array, position_ids: jax.Array, length: jax.Array, attention=attend) -> jax.Array:
        """One image through the ViT.

        Args:
            patches: `[T, patch * patch * channels]`, each patch flattened (row, column, channel), in [-1, 1].
            position_ids: `[T]` int32, rows of the position table.
            length: how many of the T are real, a scalar; the rest is padding that no real patch sees.
            attention: `attend`, or what gives the same.

        Returns:
            `[T, width]`.
        """
        kv_end = jnp.full((patches.shape[0],), length, jnp.int32)
        return self._run(patches, position_ids, lambda q, kv: attention(q, kv, kv_end))

    def packed(
        self, patches: jax.Array, position_ids: jax.Array, mask: PackedMask, *, remat: bool = False
    ) -> jax.Array:
        """Rows of several images each, for training.

        Args:
            patches: `[B, T, patch * patch * channels]`, as above.
            position_ids: `[B, T]` int32.
            mask: who sees whom, fields `[B, T]`.
            remat: see `scan_layers`.

        Returns:
            `[B, T, width]`.
        """
        return self._run(patches, position_ids, lambda q, kv: jax.vmap(attend_packed)(q, kv, mask), remat=remat)

    def _run(self, patches, position_ids, attention, *, remat=False):
        x = self.patch_embed(patches) + self.positions(position_ids)
        x, _ = scan_layers(self.layers, lambda layer, x, _: (layer(x, attention), None), x, remat=remat)
        return self.post_norm(x)
