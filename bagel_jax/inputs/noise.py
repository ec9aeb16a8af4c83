"""The random numbers of a request, from its seed alone.

They are drawn on the host with NumPy's RandomState, whose streams are frozen for good, each kind of draw from a
stream of its own. So they depend on no device, no mesh, no version of jax, and on nothing else that is drawn.
"""

from __future__ import annotations

import numpy as np

_LATENT, _POSTERIOR = 0, 1


def _draw(key: list[int], shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(key).standard_normal(shape).astype(np.float32)


def initial_latent(seed: int, num_tokens: int, width: int) -> np.ndarray:
    """The noise that denoising starts from, `[N, C p²]`."""
    return _draw([seed, _LATENT], (num_tokens, width))


def posterior(seed: int, image: int, height: int, width: int, channels: int) -> np.ndarray:
    """The noise of the autoencoder's sample of input image number `image`, `[h, w, C]`."""
    return _draw([seed, _POSTERIOR, image], (height, width, channels))
