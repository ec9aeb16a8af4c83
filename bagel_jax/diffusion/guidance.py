"""Classifier-free guidance of three branches, with renormalisation.

Source: `_forward_flow` in the official `modeling/bagel/bagel.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bagel_jax.request import RENORM_TYPES


class Guidance(NamedTuple):
    """The strength of guidance; all traced. A scale of 1 or less switches its branch off."""

    text_scale: jax.Array
    img_scale: jax.Array
    renorm_type: jax.Array  # index into RENORM_TYPES
    renorm_min: jax.Array


def guidance(text_scale: float, img_scale: float, renorm_type: str, renorm_min: float) -> Guidance:
    """`Guidance` from a request's settings."""
    return Guidance(
        jnp.float32(text_scale),
        jnp.float32(img_scale),
        jnp.int32(RENORM_TYPES.index(renorm_type)),
        jnp.float32(renorm_min),
    )


def combine(main: jax.Array, text: jax.Array, img: jax.Array, g: Guidance) -> jax.Array:
    """The guided velocity of one request; its norms never see another request.

    Args:
        main: velocity with the full context, `[N, C p²]`.
        text: without the last text.
        img: without pictures; not looked at where `img_scale` is off.
        g: see `Guidance`; `text_scale` must be on, since without it the official code guides nothing at all.
    """

    def by_image(v):
        return jnp.where(g.img_scale > 1, img + g.img_scale * (v - img), v)

    def renormed(v, axis):
        norm = jnp.linalg.norm(main, axis=axis, keepdims=True)
        scale = norm / (jnp.linalg.norm(v, axis=axis, keepdims=True) + 1e-8)
        return v * jnp.clip(scale, g.renorm_min, 1.0)

    by_text = text + g.text_scale * (main - text)
    variants = {
        "global": lambda: renormed(by_image(by_text), None),
        "channel": lambda: renormed(by_image(by_text), -1),
        "text_channel": lambda: by_image(renormed(by_text, -1)),
    }
    return jax.lax.switch(g.renorm_type, [variants[name] for name in RENORM_TYPES])
