"""The Mixture-of-Transformers trunk: two sets of expert weights, one attention.

Text and ViT tokens go through the understanding expert, latent tokens through the generation expert, and the two
markers around a latent block through the understanding one. Which token is which is known from the block, so
experts are chosen by slicing, never by a gather.

Source: official `modeling/bagel/qwen2_navit.py`, `Qwen2MoTDecoderLayer` and `PackedAttentionMoT`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bagel_jax.config import TrunkConfig
from bagel_jax.layout import PackedMask
from bagel_jax.models.attention import KV, attend_packed
from bagel_jax.models.layers import (
    ACTIVATIONS,
    from_heads,
    linear,
    precision,
    rms_norm,
    scan_layers,
    stack,
    to_heads,
)


class Block(NamedTuple):
    """What tokens have, kept apart by expert: hidden states `und` `[..., T, D]`, and `gen` `[..., N, D]` if there are
    latents, or their queries, keys and values `[..., T or N, heads, E]`.

    Attention does not mind in which order its keys stand, so the tokens of `und` come first whatever their places in
    their sequences are; masks and RoPE positions know those.
    """

    und: Any
    gen: Any = None

    def joined(self, axis: int) -> jax.Array:
        """All tokens' as one array, along the axis where tokens are; the understanding expert's first."""
        return self.und if self.gen is None else jnp.concatenate(self, axis)

    def split(self, x: jax.Array, axis: int) -> Block:
        """The inverse of `joined` for tokens as these."""
        size = self.und.shape[axis]
        return Block(x) if self.gen is None else Block(*jnp.split(x, [size], axis))


def rotary(positions: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of rotary position embedding, `[..., E]` float32, for integer `positions` `[...]`."""
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = (np.float32(1) / np.float32(theta) ** exponent).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * jnp.concatenate([frequencies, frequencies])
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x, cos, sin):
    """Rotary embedding of `x` `[B, T, heads, E]` in float32; the halves of E are the pairs."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x.astype(jnp.float32) * cos[..., None, :] + turned * sin[..., None, :]


class Expert(nnx.Module):
    """The weights of one expert in one layer: norms, attention projections, gated MLP.

    Kernels of the projections: q `[D, H, E]`, k and v `[D, K, E]`, o `[H, E, D]`.
    """

    def __init__(self, c: TrunkConfig, dtype, rngs: nnx.Rngs):
        self.config, self.dtype = c, dtype
        self.input_norm = rms_norm(c.hidden_size, c.norm_eps, dtype, rngs)
        self.q = to_heads(c.hidden_size, c.num_heads, c.head_dim, dtype, rngs)
        self.k = to_heads(c.hidden_size, c.num_kv_heads, c.head_dim, dtype, rngs)
        self.v = to_heads(c.hidden_size, c.num_kv_heads, c.head_dim, dtype, rngs)
        self.o = from_heads(c.num_heads, c.head_dim, c.hidden_size, dtype, rngs)
        # Float32 out: the rotation that follows is done before rounding.
        self.q_norm = nnx.RMSNorm(c.head_dim, epsilon=c.norm_eps, dtype=jnp.float32, param_dtype=dtype, rngs=rngs)
        self.k_norm = nnx.RMSNorm(c.head_dim, epsilon=c.norm_eps, dtype=jnp.float32, param_dtype=dtype, rngs=rngs)
        self.post_norm = rms_norm(c.hidden_size, c.norm_eps, dtype, rngs)
        self.gate = linear(c.hidden_size, c.mlp_width, dtype, rngs, bias=False)
        self.up = linear(c.hidden_size, c.mlp_width, dtype, rngs, bias=False)
        self.down = linear(c.mlp_width, c.hidden_size, dtype, rngs, bias=False)

    def qkv(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[B, T, D]` -> queries `[B, T, H, E]`, keys and values `[B, T, K, E]`, normed and rotated."""
        h = self.input_norm(x)
        # So that nothing is fused into the projections: libtpu 0.0.50 tries to for a v5p at some lengths of text (512,
        # 1024) and aborts the process, "TransformWindow: split of a padded window dim is not supported".
        q, k, v = jax.lax.optimization_barrier((self.q(h), self.k(h), self.v(h)))
        q = _rotate(self.q_norm(q), cos, sin).astype(self.dtype)
        k = _rotate(self.k_norm(k), cos, sin).astype(self.dtype)
        return q, k, v

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Residual `[B, T, D]` and attention output `[B, T, H, E]` -> the layer's output `[B, T, D]`."""
        x = x + self.o(attended)
        h = self.post_norm(x)
        return x + self.down(ACTIVATIONS[self.config.activation](self.gate(h)) * self.up(h))


class Layer(nnx.Module):
    """One layer: both experts around one attention."""

    def __init__(self, c: TrunkConfig, dtype, rngs: nnx.Rngs):
        self.und = Expert(c, dtype, rngs)
        self.gen = Expert(c, dtype, rngs)

    def qkv(self, x: Block, rotation: Block) -> tuple[Block, Block, Block]:
        """Queries, keys and values of tokens; `rotation` has `rotary` of their positions."""
        und = self.und.qkv(x.und, *rotation.und)
        if x.gen is None:
            q, k, v = map(Block, und)
        else:
            q, k, v = map(Block, und, self.gen.qkv(x.gen, *rotation.gen))
        return q, k, v

    def finish(self, x: Block, attended: Block) -> Block:
        """The layer's output, of its input and the attention's output `[..., T or N, H, E]`."""
        und = self.und.finish(x.und, attended.und)
        return Block(und, None if x.gen is None else self.gen.finish(x.gen, attended.gen))

    def __call__(self, x: Block, rotation: Block, attention) -> tuple[Block, Any]:
        """One layer over tokens; rows B may be missing.

        `attention(q, k, v)` knows who sees whom; what it returns beside its output, a `Block` as `q` is, is returned.
        """
        out, extra = attention(*self.qkv(x, rotation))
        return self.finish(x, out), extra


class MoT(nnx.Module):
    """Token embedding, L layers, final norms and the output head."""

    def __init__(self, c: TrunkConfig, dtype, rngs: nnx.Rngs, make_layers=stack):
        self.config = c
        self.embed = nnx.Embed(c.vocab_size, c.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = make_layers(partial(Layer, c, dtype), c.num_layers, rngs)
        self.norm = rms_norm(c.hidden_size, c.norm_eps, dtype, rngs)
        self.norm_gen = rms_norm(c.hidden_size, c.norm_eps, dtype, rngs)
        self.lm_head = linear(c.hidden_size, c.vocab_size, dtype, rngs, bias=False)

    def __call__(
        self, x: Block, positions: jax.Array, attention, cache: Any = None, *, remat: bool = False
    ) -> tuple[Block, Any]:
        """All layers over tokens of any sequences, whose keys and values are kept in a cache of any form.

        Args:
            x: embedded tokens, `und` `[..., T, D]` and `gen` `[..., N, D]` or None.
            positions: RoPE positions, `[..., T + N]`.
            attention: `attention(layer, q, k, v, cache) -> out, cache`, for the number of the layer and queries, keys
                and values, each a `Block`: attends to what is in the cache and to what it puts there.
            cache: a pytree that goes from layer to layer, so that it is changed in place.
            remat: see `scan_layers`.

        Returns:
            The hidden states behind the last layer, before the final norms, and the cache.
        """
        rotation = self.rotation(x, positions)

        def step(layer, carry, number):
            x, cache = carry
            return layer(x, rotation, lambda q, k, v: attention(number, q, k, v, cache)), None

        numbers = jnp.arange(self.config.num_layers)
        return scan_layers(self.layers, step, (x, cache), numbers, remat=remat)[0]

    def rotation(self, x: Block, positions: jax.Array) -> Block:
        """`rotary` of the positions `[..., T + N]` of tokens, of either expert's."""
        width, theta = self.config.head_dim, self.config.rope_theta
        return Block(*(p if p is None else rotary(p[..., 0], width, theta) for p in x.split(positions[..., None], -2)))

    def normed(self, x: Block) -> Block:
        """Hidden states through the final norms."""
        return Block(self.norm(x.und), None if x.gen is None else self.norm_gen(x.gen))

    def packed(self, x: Block, positions: jax.Array, mask: PackedMask, *, remat: bool = False) -> Block:
        """All layers over rows that hold several samples each, for training.

        Args:
            x: embedded tokens, `und` `[B, T, D]` and `gen` `[B, N, D]`, both there.
            positions: RoPE positions, `[B, T + N]`.
            mask: who sees whom, fields `[B, T + N]`.
            remat: see `scan_layers`.

        Returns:
            The normed hidden states.
        """

        def attention(_, q, k, v, cache):
            kv = KV(k.joined(1), v.joined(1))
            return q.split(jax.vmap(attend_packed)(q.joined(1), kv, mask), 1), cache

        return self.normed(self(x, positions, attention, remat=remat)[0])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Normed hidden states `[..., D]` -> `[..., V]` float32."""
        kernel = self.lm_head.kernel[...]
        return jnp.matmul(hidden, kernel, precision=precision(hidden.dtype), preferred_element_type=jnp.float32)
