"""The jitted programs of stage 0 over a dense cache: prefill of a text, of a picture, and decoding.

A program is compiled for the padded lengths (`bucket`) of its arguments. Where in the cache a block goes, its RoPE
position and how much of it is padding are traced. Padding is written past the block's end, where the next block
overwrites it and no mask reaches.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bagel_jax.models.attention import KV
from bagel_jax.models.bagel import BagelModel
from bagel_jax.models.mot import Block, Prefix

program = partial(jax.jit, static_argnames=("graph",), donate_argnames=("cache",))


def bucket(length: int, least: int = 16) -> int:
    """A length padded to one of few: at most an eighth more, and at least `least`."""
    unit = max(least, 2 ** max(0, length.bit_length() - 4))
    return max(least, -(-length // unit) * unit)


def empty_cache(model_config, capacity: int, dtype) -> KV:
    """A dense cache `[L, S, K, E]` of zeros."""
    c = model_config.trunk
    shape = (c.num_layers, capacity, c.num_kv_heads, c.head_dim)
    return KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def _append(model: BagelModel, cache: KV, start, block: Block, positions, kv_end) -> tuple[Block, KV]:
    """Runs one row of tokens behind the first `start` of the cache and writes their keys and values there."""
    prefix = Prefix((cache,), (0,), start[None])
    out, fresh = model.trunk(block, positions, kv_end, prefix)
    written = [
        jax.lax.dynamic_update_slice_in_dim(old, new[:, 0], start, axis=1)
        for old, new in zip(cache, fresh, strict=True)
    ]
    return out, KV(*written)


@program
def prefill_text(graph, params, cache: KV, ids, start, rope) -> KV:
    """Appends a text.

    Args:
        graph, params: the model, split.
        cache: `[L, S, K, E]`; donated.
        ids: `[T]` int32, padded.
        start: tokens already in the cache.
        rope: RoPE position of the first token.
    """
    model = nnx.merge(graph, params)
    count = jnp.arange(ids.shape[0])
    return _append(model, cache, start, Block(model.trunk.embed(ids)[None]), (rope + count)[None], count + 1)[1]


@program
def prefill_vit(graph, params, cache: KV, patches, position_ids, length, markers, start, rope) -> KV:
    """Appends a picture's ViT block: `<|vision_start|>`, patches, `<|vision_end|>`.

    Args:
        graph, params, cache, start: see `prefill_text`.
        patches: `[T, patch patch 3]` and
        position_ids: `[T]`, padded;
        length: how many of the T are real.
        markers: `[2]` token ids.
        rope: the RoPE position of the whole block.
    """
    model = nnx.merge(graph, params)
    x = model.embed_vit(patches, position_ids, length)
    first, last = model.trunk.embed(markers)
    x = jnp.concatenate([first[None], x, last[None]])
    x = jnp.where(jnp.arange(x.shape[0])[:, None] == length + 1, last, x)
    kv_end = jnp.full((x.shape[0],), length + 2, jnp.int32)
    return _append(model, cache, start, Block(x[None]), rope[None, None], kv_end)[1]


@program
def prefill_vae(graph, params, cache: KV, pixels, noise, position_ids, markers, start, rope) -> KV:
    """Appends a picture's latent block: `<|vision_start|>`, clean latent tokens, `<|vision_end|>`.

    Args:
        graph, params, cache, markers, start, rope: see `prefill_vit`.
        pixels: `[H, W, 3]` in [-1, 1].
        noise: `[h, w, C]` for the posterior sample.
        position_ids: `[N]`.
    """
    model = nnx.merge(graph, params)
    latents = model.autoencoder.encode(pixels[None], noise[None])[0]
    tokens = model.patchify_latents(latents)[None]
    block = model.latent_block(tokens, jnp.zeros((1,)), position_ids, markers)
    size = tokens.shape[1] + 2
    return _append(model, cache, start, block, rope[None, None], jnp.full((size,), size, jnp.int32))[1]


def next_logits(model: BagelModel, cache: KV, token, length, rope) -> tuple[jax.Array, KV]:
    """One decoding step: the logits `[V]` after `token`, and the cache with the token in it."""
    x = Block(model.trunk.embed(token[None])[None])
    out, cache = _append(model, cache, length, x, rope[None, None], jnp.ones((1,), jnp.int32))
    return model.trunk.logits(out.und[0, 0]), cache


class DecodeState(NamedTuple):
    """Where decoding stands. `tokens[:count]` are in the cache; `token` is next unless `done`."""

    tokens: jax.Array  # [M] int32
    count: jax.Array
    token: jax.Array
    length: jax.Array  # tokens in the cache
    rope: jax.Array
    done: jax.Array


class Sampling(NamedTuple):
    """How the next token is chosen; all traced."""

    key: jax.Array
    do_sample: jax.Array
    temperature: jax.Array
    end_token: jax.Array

    def choose(self, logits: jax.Array, count: jax.Array) -> jax.Array:
        """A token from logits `[V]`, for decoding step number `count`."""
        sampled = jax.random.categorical(jax.random.fold_in(self.key, count), logits / self.temperature)
        return jnp.where(self.do_sample, sampled, jnp.argmax(logits)).astype(jnp.int32)


@program
def decode(graph, params, cache: KV, state: DecodeState, sampling: Sampling, stop) -> tuple[DecodeState, KV]:
    """Decodes until `stop` tokens are there, or the end token is chosen; that one is not kept.

    Source: official `generate_text`; so `<|im_start|>`, with which decoding begins, counts as one of the tokens.
    """
    model = nnx.merge(graph, params)

    def step(carry):
        state, cache = carry
        logits, cache = next_logits(model, cache, state.token, state.length, state.rope)
        token = sampling.choose(logits, state.count)
        state = DecodeState(
            tokens=state.tokens.at[state.count].set(state.token),
            count=state.count + 1,
            token=token,
            length=state.length + 1,
            rope=state.rope + 1,
            done=token == sampling.end_token,
        )
        return state, cache

    return jax.lax.while_loop(lambda c: (c[0].count < stop) & ~c[0].done, step, (state, cache))
