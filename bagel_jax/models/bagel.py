"""The whole model: trunk, ViT, autoencoder, and the small pieces that join them.

Source: official `modeling/bagel/bagel.py` and `modeling/bagel/modeling_utils.py`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bagel_jax.config import BagelConfig
from bagel_jax.layout import NUM_MARKERS
from bagel_jax.models.attention import attend
from bagel_jax.models.autoencoder import AutoEncoder
from bagel_jax.models.layers import ACTIVATIONS, linear, stack
from bagel_jax.models.mot import Block, MoT
from bagel_jax.models.siglip import SigLIP


class Connector(nnx.Module):
    """Two linear layers from the ViT's width to the trunk's."""

    def __init__(self, width_in: int, width_out: int, activation: str, dtype, rngs: nnx.Rngs):
        self.activation = activation
        self.fc1 = linear(width_in, width_out, dtype, rngs)
        self.fc2 = linear(width_out, width_out, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[T, width_in]` -> `[T, D]`."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class TimestepEmbedder(nnx.Module):
    """Sinusoidal features of a timestep through a small MLP."""

    def __init__(self, num_features: int, width: int, dtype, rngs: nnx.Rngs):
        self.num_features = num_features
        self.fc1 = linear(num_features, width, dtype, rngs)
        self.fc2 = linear(width, width, dtype, rngs)

    def __call__(self, timestep: jax.Array) -> jax.Array:
        """Timesteps `[...]` in [0, 1] -> `[..., D]`."""
        half = self.num_features // 2
        frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / half)
        angles = timestep.astype(jnp.float32)[..., None] * frequencies
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        features = jnp.pad(features, (*[(0, 0)] * timestep.ndim, (0, self.num_features % 2)))
        return self.fc2(jax.nn.silu(self.fc1(features)))


class BagelModel(nnx.Module):
    """All networks of BAGEL; parameters are stored and used in `dtype`."""

    def __init__(self, c: BagelConfig, dtype, rngs: nnx.Rngs, trunk_layers=stack):
        self.config, self.dtype = c, dtype
        width = c.trunk.hidden_size
        self.trunk = MoT(c.trunk, dtype, rngs, trunk_layers)
        self.vit = SigLIP(c.vit, dtype, rngs)
        self.connector = Connector(c.vit.hidden_size, width, c.connector_activation, dtype, rngs)
        self.vit_positions = nnx.Embed(c.max_vit_patches**2, width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.time_embed = TimestepEmbedder(c.time_frequencies, width, dtype, rngs)
        self.latent_positions = nnx.Embed(c.max_latent_size**2, width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.latent_in = linear(c.latent_dim, width, dtype, rngs)
        self.latent_out = linear(width, c.latent_dim, dtype, rngs)
        self.autoencoder = AutoEncoder(c.autoencoder, dtype, rngs)

    def embed_vit(self, patches: jax.Array, position_ids: jax.Array, length: jax.Array, attention=attend) -> jax.Array:
        """One image's patches (see `SigLIP.__call__`) -> trunk inputs `[T, D]`."""
        return self.connector(self.vit(patches, position_ids, length, attention)) + self.vit_positions(position_ids)

    def embed_latents(self, latents: jax.Array, timestep: jax.Array, position_ids: jax.Array) -> jax.Array:
        """Latent tokens `[B, N, C p²]` at `timestep` (0: clean), with rows of the position table -> `[B, N, D]`.

        `timestep` is `[B, N]`, or `[B, 1]` for one a row; `position_ids` `[N]` or `[B, N]`.
        """
        return self.latent_in(latents) + self.time_embed(timestep) + self.latent_positions(position_ids)

    def noised_hidden(
        self,
        latents: jax.Array,
        timestep: jax.Array,
        position_ids: jax.Array,
        markers: jax.Array,
        rope: jax.Array,
        attention,
        cache: Any = None,
    ) -> tuple[jax.Array, Any]:
        """The trunk over blocks of noisy latents, each with its two markers.

        Args:
            latents: `[B, N, C p²]`.
            timestep: `[B]` in [0, 1], 1 being noise.
            position_ids: `[B, N]` rows of the latent position table.
            markers: `[2]` token ids of `<|vision_start|>` and `<|vision_end|>`.
            rope: `[B]` int32, the RoPE position that each row's block has.
            attention, cache: see `MoT.__call__`; tokens are `[B, 2 + N]`, markers first.

        Returns:
            The latents' hidden states behind the last layer, `[B, N, D]`, of which `velocity` makes velocities, and the
            cache.
        """
        batch, count = latents.shape[:2]
        und = jnp.broadcast_to(self.trunk.embed(markers), (batch, NUM_MARKERS, self.config.trunk.hidden_size))
        block = Block(und, self.embed_latents(latents, timestep[:, None], position_ids))
        positions = jnp.broadcast_to(rope[:, None], (batch, NUM_MARKERS + count))
        out, cache = self.trunk(block, positions, attention, cache)
        return out.gen, cache

    def velocity(self, hidden: jax.Array) -> jax.Array:
        """Hidden states of latents `[..., D]` -> their velocity, from data to noise, `[..., C p²]` float32."""
        return self.latent_out(self.trunk.norm_gen(hidden)).astype(jnp.float32)

    def patchify_latents(self, latents: jax.Array) -> jax.Array:
        """Latents `[h, w, C]` -> tokens `[N, p p C]`, each token flattened (row, column, channel).

        Rows and columns that do not fill a token are left out, as in the official code.
        """
        p = self.config.latent_patch_size
        rows, columns = latents.shape[0] // p, latents.shape[1] // p
        x = latents[: rows * p, : columns * p].reshape(rows, p, columns, p, -1)
        return x.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)

    def unpatchify_latents(self, tokens: jax.Array, rows: int, columns: int) -> jax.Array:
        """The inverse of `patchify_latents`: `[N, p p C]` -> `[rows p, columns p, C]`."""
        p = self.config.latent_patch_size
        x = tokens.reshape(rows, columns, p, p, -1).transpose(0, 2, 1, 3, 4)
        return x.reshape(rows * p, columns * p, -1)
