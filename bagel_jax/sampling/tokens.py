"""Choosing the next token of each row."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SamplingParams(NamedTuple):
    """How each of R rows chooses; all traced."""

    key: jax.Array  # [R, 2] uint32, threefry key of the request
    do_sample: jax.Array  # [R] bool; False: the likeliest token
    temperature: jax.Array  # [R]
    top_k: jax.Array  # [R] int32; 0: all
    top_p: jax.Array  # [R]; 1: all


def choose(logits: jax.Array, count: jax.Array, s: SamplingParams) -> jax.Array:
    """The next tokens.

    Args:
        logits: `[R, V]`.
        count: `[R]` int32, the number of each row's decoding step; with the key it gives the step's randomness.
        s: see `SamplingParams`.

    Returns:
        `[R]` int32.
    """
    likeliest = jnp.argmax(logits, axis=-1)

    def sampled():
        scaled = logits / jnp.where(s.do_sample, s.temperature, 1.0)[:, None]
        narrow = s.do_sample & ((s.top_k > 0) | (s.top_p < 1))
        # Sorting the vocabulary costs more than the rest together.
        scaled = jax.lax.cond(narrow.any(), lambda: _narrowed(scaled, s.top_k, s.top_p), lambda: scaled)
        keys = jax.random.wrap_key_data(s.key, impl="threefry2x32")
        draw = jax.vmap(lambda key, n, row: jax.random.categorical(jax.random.fold_in(key, n), row))
        return jnp.where(s.do_sample, draw(keys, count, scaled), likeliest)

    return jax.lax.cond(s.do_sample.any(), sampled, lambda: likeliest).astype(jnp.int32)


def _narrowed(logits, top_k, top_p):
    """Only the `top_k` likeliest tokens, and of those the fewest whose chances add up to `top_p`; others are -inf."""
    size = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    within = jnp.arange(size) < jnp.where(top_k > 0, top_k, size)[:, None]
    chances = jax.nn.softmax(jnp.where(within, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    # The likeliest one always stays.
    stays = within & ((before < top_p[:, None]) | (jnp.arange(size) == 0))
    least = jnp.where(stays, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
