"""The FLUX autoencoder: pixels to latents and back.

Source: official `modeling/autoencoder.py`. Arrays are channels-last, `[B, height, width, channels]`.

So that not every size of an image compiles programs of its own, arrays may be padded on the right and below, to any
multiple of the downsampling, and come with the size of what is real (`Real`), which is data. There everything is as if
nothing else were there: before each convolution the rest is set to the zeros of its padding, norms take their
statistics over real pixels, and attention sees no others. What the padding holds does not matter, not even NaN. Without
a size all is real, and nothing of this is computed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from bagel_jax.config import AutoencoderConfig
from bagel_jax.errors import InputError
from bagel_jax.models.attention import KV, attend, attend_some
from bagel_jax.models.layers import precision

NORM_GROUPS = 32


class Real:
    """Which part of padded arrays is real, at whatever resolution: each halving rounds down, as convolutions do.

    Args:
        size: `[B, 2]` or `[2]` int32, real height and width of an array; at least one latent cell of each.
        shape: of that array, `[B, H, W, ...]`, the finest of all that are asked about.

    Raises:
        InputError: `size` has another shape.
    """

    def __init__(self, size: jax.Array, shape: tuple[int, ...]):
        if size.shape not in ((2,), (shape[0], 2)):
            raise InputError(f"size has shape {list(size.shape)}; for {shape[0]} images it must be [{shape[0]}, 2]")
        self.size, self.height = jnp.broadcast_to(size, (shape[0], 2)), shape[1]

    def only(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, width]` with zeros for what is not real."""
        rows, columns = self._mask(x)
        return jnp.where(rows[:, :, None, None] & columns[:, None, :, None], x, jnp.zeros((), x.dtype))

    def pixels(self, x: jax.Array) -> jax.Array:
        """`[B, h w]` bool: which pixels of `[B, h, w, width]` are real."""
        rows, columns = self._mask(x)
        return (rows[:, :, None] & columns[:, None]).reshape(x.shape[0], -1)

    def mean(self, x: jax.Array) -> jax.Array:
        """The mean `[B, width]` over the real pixels of `[B, h, w, width]`."""
        return self.only(x).sum((1, 2)) / self._at(x).prod(axis=1, keepdims=True)

    def _at(self, x):
        return self.size // (self.height // x.shape[1])

    def _mask(self, x):
        size = self._at(x)
        return jnp.arange(x.shape[1]) < size[:, :1], jnp.arange(x.shape[2]) < size[:, 1:]


def _only(real: Real | None, x: jax.Array) -> jax.Array:
    return x if real is None else real.only(x)


class Pointwise(nnx.Conv):
    """A 1x1 convolution as the matrix product that it is: as a convolution XLA takes four times as long on a CPU."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width_in]` -> `[..., width_out]`."""
        return jnp.matmul(x, self.kernel[0, 0], precision=self.precision) + self.bias[...]


class GroupNorm(nnx.GroupNorm):
    """`nnx.GroupNorm`, which is three times as fast on a CPU where means are taken over pixels first, then channels."""

    def __call__(self, x: jax.Array, real: Real | None = None) -> jax.Array:
        """`[B, h, w, width]` -> the same shape; statistics in float32, variance in two passes as PyTorch's.

        What is not real comes out as zeros, so that a convolution may follow, also behind a SiLU.
        """

        def mean(x):
            by_channel = x.mean((1, 2)) if real is None else real.mean(x)
            by_group = by_channel.reshape(x.shape[0], self.num_groups, -1).mean(-1)
            return jnp.repeat(by_group, x.shape[-1] // self.num_groups, axis=-1)[:, None, None]

        centred = x - mean(x.astype(jnp.float32))
        scale = jax.lax.rsqrt(mean(centred**2) + self.epsilon) * self.scale[...]
        return _only(real, (centred * scale + self.bias[...]).astype(self.dtype))


def _conv(width_in, width_out, size, dtype, rngs, *, stride=1, padding="SAME") -> nnx.Conv:
    kind = Pointwise if size == 1 else nnx.Conv
    return kind(
        width_in,
        width_out,
        (size, size),
        strides=stride,
        padding=padding,
        dtype=dtype,
        param_dtype=dtype,
        precision=precision(dtype),
        rngs=rngs,
    )


def _group_norm(width, dtype, rngs) -> GroupNorm:
    return GroupNorm(width, num_groups=NORM_GROUPS, epsilon=1e-6, dtype=dtype, param_dtype=dtype, rngs=rngs)


class ResnetBlock(nnx.Module):
    """Two normed 3x3 convolutions beside a shortcut."""

    def __init__(self, width_in: int, width_out: int, dtype, rngs: nnx.Rngs):
        self.norm1 = _group_norm(width_in, dtype, rngs)
        self.conv1 = _conv(width_in, width_out, 3, dtype, rngs)
        self.norm2 = _group_norm(width_out, dtype, rngs)
        self.conv2 = _conv(width_out, width_out, 3, dtype, rngs)
        self.nin_shortcut = None if width_in == width_out else _conv(width_in, width_out, 1, dtype, rngs)

    def __call__(self, x: jax.Array, real: Real | None = None) -> jax.Array:
        """`[B, h, w, width_in]` -> `[B, h, w, width_out]`."""
        h = self.conv1(jax.nn.silu(self.norm1(x, real)))
        h = self.conv2(jax.nn.silu(self.norm2(h, real)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttentionBlock(nnx.Module):
    """Single-head attention of every pixel to every pixel."""

    def __init__(self, width: int, dtype, rngs: nnx.Rngs):
        self.norm = _group_norm(width, dtype, rngs)
        self.q, self.k, self.v, self.proj_out = (_conv(width, width, 1, dtype, rngs) for _ in range(4))

    def __call__(self, x: jax.Array, real: Real | None = None) -> jax.Array:
        """`[B, h, w, width]` -> the same shape."""
        batch, height, width, channels = x.shape
        h = self.norm(x, real)
        q, k, v = (p(h).reshape(batch, height * width, 1, channels) for p in (self.q, self.k, self.v))
        if real is None:
            kv_end = jnp.full((height * width,), height * width, jnp.int32)
            out = jnp.stack([attend(q[i], KV(k[i], v[i]), kv_end) for i in range(batch)])
        else:
            seen = real.pixels(x)
            out = jnp.stack([attend_some(q[i], KV(k[i], v[i]), seen[i]) for i in range(batch)])
        return x + self.proj_out(out.reshape(x.shape))


class Middle(nnx.Module):
    """The coarsest level: block, attention, block."""

    def __init__(self, width: int, dtype, rngs: nnx.Rngs):
        self.block_1 = ResnetBlock(width, width, dtype, rngs)
        self.attn_1 = AttentionBlock(width, dtype, rngs)
        self.block_2 = ResnetBlock(width, width, dtype, rngs)

    def __call__(self, x: jax.Array, real: Real | None = None) -> jax.Array:
        """`[B, h, w, width]` -> the same shape."""
        return self.block_2(self.attn_1(self.block_1(x, real), real), real)


class Downsample(nnx.Module):
    """Half the resolution; padded right and bottom only, as in the official code."""

    def __init__(self, width: int, dtype, rngs: nnx.Rngs):
        self.conv = _conv(width, width, 3, dtype, rngs, stride=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: jax.Array, real: Real | None = None) -> jax.Array:
        """`[B, h, w, width]` -> `[B, h/2, w/2, width]`."""
        return self.conv(_only(real, x))


class Upsample(nnx.Module):
    """Twice the resolution: nearest neighbour, then a 3x3 convolution.

    Each of a pixel's four places sees only 2x2 pixels of the low resolution, so that summed kernels give the same with
    16 products where there would be 36.
    """

    def __init__(self, width: int, dtype, rngs: nnx.Rngs):
        self.conv = _conv(width, width, 3, dtype, rngs)

    def __call__(self, x: jax.Array, real: Real | None = None) -> jax.Array:
        """`[B, h, w, width]` -> `[B, 2h, 2w, width]`."""
        batch, height, width, channels = x.shape
        x = _only(real, x)

        def summed(kernel, axis):
            before, at, behind = jnp.split(kernel.astype(jnp.float32), 3, axis)
            return jnp.concatenate([before, at + behind], axis), jnp.concatenate([before + at, behind], axis)

        kernels = [k for upper in summed(self.conv.kernel[...], 0) for k in summed(upper, 1)]
        kernel = jnp.concatenate(kernels, axis=-1).astype(x.dtype)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=self.conv.precision,
        )
        # Position p of h + 1 has seen the pixels p - 1 and p: the upper (left) place of p, the lower (right) of p - 1.
        y = y.reshape(batch, height + 1, width + 1, 2, 2, channels)
        rows = [jnp.stack([y[:, i : height + i, j : width + j, i, j] for j in (0, 1)], axis=3) for i in (0, 1)]
        return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels) + self.conv.bias[...]


class DownLevel(nnx.Module):
    """Blocks of one resolution, then half the resolution (but for the last level)."""

    def __init__(self, width_in: int, width_out: int, num_blocks: int, last: bool, dtype, rngs: nnx.Rngs):
        widths = [width_in] + [width_out] * num_blocks
        self.block = nnx.List([ResnetBlock(widths[i], width_out, dtype, rngs) for i in range(num_blocks)])
        self.downsample = None if last else Downsample(width_out, dtype, rngs)

    def __call__(self, x: jax.Array, real: Real | None = None) -> jax.Array:
        """`[B, h, w, width_in]` -> `[B, h/2, w/2, width_out]`, or at `[h, w]` for the last level."""
        for block in self.block:
            x = block(x, real)
        return x if self.downsample is None else self.downsample(x, real)


class UpLevel(nnx.Module):
    """Blocks of one resolution, then twice the resolution (but for the finest level)."""

    def __init__(self, width_in: int, width_out: int, num_blocks: int, finest: bool, dtype, rngs: nnx.Rngs):
        widths = [width_in] + [width_out] * num_blocks
        self.block = nnx.List([ResnetBlock(widths[i], width_out, dtype, rngs) for i in range(num_blocks)])
        self.upsample = None if finest else Upsample(width_out, dtype, rngs)

    def __call__(self, x: jax.Array, real: Real | None = None) -> jax.Array:
        """`[B, h, w, width_in]` -> `[B, 2h, 2w, width_out]`, or at `[h, w]` for the finest level."""
        for block in self.block:
            x = block(x, real)
        return x if self.upsample is None else self.upsample(x, real)


class Encoder(nnx.Module):
    """Pixels to the moments of the latents."""

    def __init__(self, c: AutoencoderConfig, dtype, rngs: nnx.Rngs):
        widths = (c.base_width, *c.widths)
        self.conv_in = _conv(c.image_channels, c.base_width, 3, dtype, rngs)
        self.down = nnx.List(
            [
                DownLevel(widths[i], widths[i + 1], c.num_res_blocks, i == len(c.widths) - 1, dtype, rngs)
                for i in range(len(c.widths))
            ]
        )
        self.mid = Middle(c.widths[-1], dtype, rngs)
        self.norm_out = _group_norm(c.widths[-1], dtype, rngs)
        self.conv_out = _conv(c.widths[-1], 2 * c.latent_channels, 3, dtype, rngs)

    def __call__(self, x: jax.Array, real: Real | None = None) -> jax.Array:
        """`[B, H, W, 3]` in [-1, 1] -> `[B, h, w, 2C]`: mean and log-variance."""
        x = self.conv_in(_only(real, x))
        for level in self.down:
            x = level(x, real)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x, real), real)))


class Decoder(nnx.Module):
    """Latents to pixels. `up[0]` is the finest level and runs last, as the checkpoint numbers them."""

    def __init__(self, c: AutoencoderConfig, dtype, rngs: nnx.Rngs):
        widths = (*c.widths, c.widths[-1])
        self.conv_in = _conv(c.latent_channels, c.widths[-1], 3, dtype, rngs)
        self.mid = Middle(c.widths[-1], dtype, rngs)
        self.up = nnx.List(
            [UpLevel(widths[i + 1], widths[i], c.num_res_blocks + 1, i == 0, dtype, rngs) for i in range(len(c.widths))]
        )
        self.norm_out = _group_norm(c.widths[0], dtype, rngs)
        self.conv_out = _conv(c.widths[0], c.image_channels, 3, dtype, rngs)

    def __call__(self, z: jax.Array, real: Real | None = None) -> jax.Array:
        """`[B, h, w, C]` -> `[B, H, W, 3]`, about [-1, 1], not clipped."""
        x = self.mid(self.conv_in(_only(real, z)), real)
        for level in reversed(self.up):
            x = level(x, real)
        return self.conv_out(jax.nn.silu(self.norm_out(x, real)))


class AutoEncoder(nnx.Module):
    """Encoder and decoder, with the shift and scale that the trunk's latents have."""

    def __init__(self, c: AutoencoderConfig, dtype, rngs: nnx.Rngs):
        self.config = c
        self.encoder = Encoder(c, dtype, rngs)
        self.decoder = Decoder(c, dtype, rngs)

    def moments(self, pixels: jax.Array, size: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """`[B, H, W, 3]` in [-1, 1] -> mean and log-variance, each `[B, h, w, C]` float32; `size` as in `encode`."""
        real = None if size is None else self._real(size, pixels.shape, 1)
        mean, log_variance = jnp.split(self.encoder(pixels, real).astype(jnp.float32), 2, axis=-1)
        return mean, log_variance

    def encode(self, pixels: jax.Array, noise: jax.Array, size: jax.Array | None = None) -> jax.Array:
        """A posterior sample, shifted and scaled.

        Args:
            pixels: `[B, H, W, 3]` in [-1, 1].
            noise: `[B, h, w, C]` standard normal.
            size: `[B, 2]` or `[2]` int32: height and width in pixels of what is real, the rest of H and W, which are
                multiples of the downsampling, being padding; None: all is real.

        Returns:
            Latents `[B, h, w, C]` float32; those of padding are rubbish.
        """
        mean, log_variance = self.moments(pixels, size)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latents: jax.Array, size: jax.Array | None = None) -> jax.Array:
        """Latents `[B, h, w, C]` -> pixels `[B, H, W, 3]` float32, about [-1, 1], not clipped.

        `size`: `[B, 2]` or `[2]` int32, height and width in latent cells of what is real, the rest being padding, of
        which the pixels are rubbish; None: all is real.
        """
        real = None if size is None else self._real(size, latents.shape, self.config.downsample)
        z = latents / self.config.scale_factor + self.config.shift_factor
        return self.decoder(z, real).astype(jnp.float32)

    def _real(self, size: jax.Array, shape: tuple[int, ...], unit: int) -> Real:
        """Of images, where `size` counts `unit` pixels as one and `shape` is that of an array which does so too."""
        batch, height, width = shape[0], shape[1] * unit, shape[2] * unit
        if height % self.config.downsample or width % self.config.downsample:
            multiple = f"multiples of {self.config.downsample}"
            raise InputError(f"padded images of {height} x {width} pixels are not {multiple}; pad them to some")
        return Real(jnp.asarray(size) * unit, (batch, height, width))
