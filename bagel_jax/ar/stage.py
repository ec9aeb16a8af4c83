"""Stage 0: from a plan to a context, and text from a context.

This one serves a request at a time over dense caches.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.ar.steps import (
    DecodeState,
    Sampling,
    bucket,
    decode,
    empty_cache,
    prefill_text,
    prefill_vae,
    prefill_vit,
)
from bagel_jax.inputs.plan import Placed, Text, VaeImage, VitImage
from bagel_jax.inputs.prepare import Prepared, latent_positions, vit_positions
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.models.attention import KV
from bagel_jax.models.weights import Weights

Progress = Callable[[int, int], None]  # done, of how many

_TOKENS_A_CALL = 8


def _int32(value) -> jax.Array:
    return jnp.asarray(value, jnp.int32)


def _pad(array: np.ndarray, length: int) -> np.ndarray:
    return np.pad(array, [(0, length - array.shape[0])] + [(0, 0)] * (array.ndim - 1))


class ContextStage:
    """Builds caches and decodes.

    Args:
        weights: the model.
        config: its sizes.
        dtype: of the caches.
        tokenizer: for the marker tokens.
    """

    def __init__(self, weights: Weights, config, dtype, tokenizer: Tokenizer):
        self.weights, self.config, self.dtype, self.tokenizer = weights, config, dtype, tokenizer
        self._markers = _int32([tokenizer.vision_start, tokenizer.vision_end])

    def prefill(self, prepared: Prepared) -> list[KV]:
        """The caches of a plan, in its order, each `[L, S, K, E]` with S a bucket."""
        caches: list[KV] = []
        for build in prepared.plan.builds:
            if build.copy_from is None:
                cache = self.weights.place(empty_cache(self.config, bucket(1, 64), self.dtype))
            else:  # copied, since the programs that extend a cache use it up
                cache = jax.tree.map(jnp.copy, fitted(caches[build.copy_from], build.shared))
            # Room for all of it at once: a cache of another capacity is another program.
            cache = _grown(cache, max((_padded_end(placed) for placed in build.compute), default=1))
            for placed in build.compute:
                cache = self.extend(cache, placed, prepared)
            caches.append(cache)
        return caches

    def extend(self, cache: KV, placed: Placed, prepared: Prepared) -> KV:
        """The cache with one more segment at its place."""
        segment = placed.segment
        start, rope = _int32(placed.kv_start), _int32(placed.rope)
        model = self.weights.graph, self.weights.params
        cache = _grown(cache, _padded_end(placed))
        if isinstance(segment, Text):
            ids = _pad(np.asarray(segment.ids, np.int32), bucket(segment.num_tokens))
            return prefill_text(*model, cache, ids, start, rope)
        picture = prepared.pictures[segment.picture]
        if isinstance(segment, VaeImage):
            noise = prepared.posterior_noise[segment.picture]
            positions = latent_positions((segment.rows, segment.columns), self.config)
            return prefill_vae(*model, cache, picture.vae_pixels, noise, positions, self._markers, start, rope)
        length = len(picture.vit_patches)
        patches = _pad(picture.vit_patches, bucket(length, 64))
        positions = _pad(vit_positions(picture, self.config), bucket(length, 64))
        return prefill_vit(*model, cache, patches, positions, _int32(length), self._markers, start, rope)

    def decode(
        self, cache: KV, length: int, rope: int, max_tokens: int, sampling: Sampling, progress: Progress | None = None
    ) -> tuple[list[int], KV]:
        """Text from a context.

        Args:
            cache: the context; its first `length` tokens are left as they are.
            length: tokens of the context.
            rope: its next RoPE position.
            max_tokens: decoding steps at most, `<|im_start|>` being the first.
            sampling: how tokens are chosen.
            progress: called as `progress(done, max_tokens)` before the first token and after every few.

        Returns:
            The ids, `<|im_start|>` first and the end token not among them, and the cache with them behind the
            context.
        """
        state = DecodeState(
            tokens=jnp.zeros((bucket(max_tokens, 64),), jnp.int32),
            count=_int32(0),
            token=_int32(self.tokenizer.im_start),
            length=_int32(length),
            rope=_int32(rope),
            done=jnp.asarray(False),
        )
        state, cache = self.weights.place(state), _grown(cache, length + max_tokens)
        count = 0
        if progress is not None:
            progress(0, max_tokens)
        while count < max_tokens and not bool(state.done):
            stop = min(count + _TOKENS_A_CALL, max_tokens)
            state, cache = decode(self.weights.graph, self.weights.params, cache, state, sampling, _int32(stop))
            count = int(state.count)
            if progress is not None:
                progress(count, max_tokens)
        return np.asarray(state.tokens)[:count].tolist(), cache

    def sampling(self, seed: int, do_sample: bool, temperature: float) -> Sampling:
        """The choice of tokens for one request, random from its seed alone."""
        key = jax.random.key(seed, impl="threefry2x32")
        return Sampling(key, jnp.asarray(do_sample), jnp.float32(temperature), _int32(self.tokenizer.im_end))


def _padded_end(placed: Placed) -> int:
    """One past the last token that a segment's program writes, padding included."""
    segment = placed.segment
    if isinstance(segment, Text):
        return placed.kv_start + bucket(segment.num_tokens)
    if isinstance(segment, VitImage):
        return placed.kv_start + bucket(segment.num_tokens - 2, 64) + 2
    return placed.kv_end


def fitted(cache: KV, length: int) -> KV:
    """A cache cut to the bucket of the tokens that are wanted of it."""
    capacity = bucket(max(length, 1), 64)
    return KV(*(x[:, :capacity] for x in _grown(cache, capacity)))


def _grown(cache: KV, capacity: int) -> KV:
    """The cache with room for `capacity` tokens."""
    missing = bucket(capacity, 64) - cache.k.shape[1]
    if missing <= 0:
        return cache
    return KV(*(jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in cache))
