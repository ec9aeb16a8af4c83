"""Classifier-free guidance of three branches, with renormalisation.

Source: `_forward_flow` in the official `modeling/bagel/bagel.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.request import RENORM_TYPES, Settings


class Guidance(NamedTuple):
    """The strength of guidance; all traced. A scale of 1 or less switches its branch off."""

    text_scale: jax.Array
    img_scale: jax.Array
    renorm_type: jax.Array  # index into RENORM_TYPES
    renorm_min: jax.Array


def guidance(s: Settings) -> Guidance:
    """`Guidance` from a request's settings; on the host."""
    return Guidance(
        np.float32(s.cfg_text_scale),
        np.float32(s.cfg_img_scale),
        np.int32(RENORM_TYPES.index(s.cfg_renorm_type)),
        np.float32(s.cfg_renorm_min),
    )


def branches_on(s: Settings, guided: bool) -> tuple[bool, bool]:
    """Whether the branches without the last text and without images are on at a step in or out of the interval.

    Without guidance by text the official code guides nothing at all.
    """
    text = bool(guided) and s.cfg_text_scale > 1
    return text, text and s.cfg_img_scale > 1


def combine(main: jax.Array, text: jax.Array, img: jax.Array, g: Guidance) -> jax.Array:
    """The guided velocity of one request; its norms never see another request.

    Args:
        main: velocity with the full context, `[N, C p²]`, zero for tokens that are padding.
        text: without the last text.
        img: without images; not looked at where `img_scale` is off.
        g: see `Guidance`; `text_scale` must be on.
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
