"""The random numbers of a request, from its seed alone.

They are drawn on the host with NumPy's RandomState, whose streams are frozen for good. So they depend on no device, no
mesh, no version of jax, and on nothing else that is drawn. There are two ways to draw them, `options.NoiseSource`:

- `official`: the numbers of the official `app.py` for a seed, see `official`.
- `numpy`: every draw from a stream of its own, see `separate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bagel_jax.request import NoiseSource

# Posterior samples `[h, w, C]`, one an input image, and the initial latent `[N, C p²]`.
Noise = tuple[tuple[np.ndarray, ...], np.ndarray]


def draw(
    source: NoiseSource,
    seed: int,
    latent: tuple[int, int],
    image_seeds: Sequence[int] = (),
    images: Sequence[tuple[int, int, int]] = (),
) -> Noise:
    """All noise of a request that makes an image.

    Args:
        source: which numbers a seed means.
        seed: of the initial latent.
        latent: its shape, `[N, C p²]`.
        image_seeds: of the autoencoder's posterior samples of the input images, one each.
        images: the shapes of these samples, `[h, w, C]`.
    """
    return _SOURCES[source](seed, latent, image_seeds, images)


def official(
    seed: int, latent: tuple[int, int], image_seeds: Sequence[int], images: Sequence[tuple[int, int, int]]
) -> Noise:
    """What the official `app.py` draws after `set_seed(seed)`; arguments as of `draw`.

    A seed is one stream, of which the posterior samples take the first numbers, image after image, and the initial
    latent the next. The app takes nothing else from it: tokens are sampled on the GPU, by its generator, while the
    autoencoder stays on the CPU. Where that is on the GPU too, as in the official evaluation scripts, an edit's latent
    is the first draw of its seed, and its posterior samples depend on the kind of GPU; neither is given here. Images
    with seeds of their own, which the app has not, take the first numbers of theirs.

    Source: official `app.py` (`load_ae`, `set_seed`), `modeling/autoencoder.py` (`DiagonalGaussian`) and
    `modeling/bagel/bagel.py` (`prepare_vae_latent`).
    """
    streams = {one: TorchNormal(one) for one in (*image_seeds, seed)}
    posterior = tuple(
        streams[one](channels, height, width).transpose(1, 2, 0)
        for one, (height, width, channels) in zip(image_seeds, images, strict=True)
    )
    return posterior, streams[seed](*latent)


def separate(
    seed: int, latent: tuple[int, int], image_seeds: Sequence[int], images: Sequence[tuple[int, int, int]]
) -> Noise:
    """Every draw from a stream of its own, by its seed, its purpose and its number; arguments as of `draw`."""

    def normal(key: list[int], shape: tuple[int, ...]) -> np.ndarray:
        return np.random.RandomState(key).standard_normal(shape).astype(np.float32)

    numbered = enumerate(zip(image_seeds, images, strict=True))
    return tuple(normal([one, 1, i], shape) for i, (one, shape) in numbered), normal([seed, 0], latent)


_Draw = Callable[[int, tuple[int, int], Sequence[int], Sequence[tuple[int, int, int]]], Noise]
_SOURCES: Mapping[NoiseSource, _Draw] = {"official": official, "numpy": separate}


class TorchNormal:
    """`torch.randn(..., dtype=torch.float32)` on a CPU after `torch.manual_seed(seed)`, call after call.

    Both sides step the same Mersenne Twister. Its numbers are made normal as PyTorch's kernels for AVX2 do it, but in
    float64 where the result does not show it: within 5e-7 of these kernels, and the same on every machine. (PyTorch
    without AVX2 is up to 2.4e-6 away from that.)

    Source: PyTorch's `aten/src/ATen/native/cpu/DistributionTemplates.h` (`normal_fill_AVX2`) and
    `aten/src/ATen/core/DistributionsHelper.h` (`normal_distribution`).

    Args:
        seed: up to 2³² - 1; PyTorch takes the lower 32 bits of others.
    """

    def __init__(self, seed: int):
        self._twister = np.random.RandomState(seed)
        self._sine: float | None = None  # the second half of a pair that `_few` began

    def __call__(self, *shape: int) -> np.ndarray:
        """The next numbers, float32."""
        size = math.prod(shape)
        return (self._few(size) if size < 16 else self._many(size)).astype(np.float32).reshape(shape)

    def _many(self, size: int) -> np.ndarray:
        """At least 16: Box-Muller by blocks of 16, the first eight for the radius, the others for the angle."""
        values = self._blocks(self._uniforms(size)[: size // 16 * 16])
        if size % 16:  # the last 16 once more, from fresh numbers
            values = np.concatenate([values[: size - 16], self._blocks(self._uniforms(16))])
        return values

    def _blocks(self, uniforms: np.ndarray) -> np.ndarray:
        first, second = uniforms.reshape(-1, 2, 8).swapaxes(0, 1)
        radius = np.sqrt(-2 * np.log(1.0 - first.astype(np.float64)))
        angle = (np.float32(2 * math.pi) * second).astype(np.float64)  # this rounding does show
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()

    def _uniforms(self, size: int) -> np.ndarray:
        """Of 24 bits, float32: the lower ones of a word each."""
        return (self._words(size) & 0xFFFFFF).astype(np.float32) / np.float32(2**24)

    def _few(self, size: int) -> np.ndarray:
        """Fewer than 16: one by one, in pairs that may straddle calls."""
        values = np.empty(size)
        for i in range(size):
            if self._sine is not None:
                values[i], self._sine = self._sine, None
                continue
            high, low = self._words(4).astype(np.uint64).reshape(2, 2).T
            angle, radius = ((high << 32 | low) & (2**53 - 1)) / 2**53
            angle, radius = 2 * math.pi * angle, math.sqrt(-2 * math.log1p(-radius))
            values[i], self._sine = radius * math.cos(angle), radius * math.sin(angle)
        return values

    def _words(self, size: int) -> np.ndarray:
        return self._twister.randint(0, 2**32, size, np.uint32)
