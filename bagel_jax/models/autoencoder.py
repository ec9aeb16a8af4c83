"""The FLUX autoencoder: pixels to latents and back.

Source: official `modeling/autoencoder.py`. Arrays are channels-last, `[B, height, width, channels]`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from bagel_jax.config import AutoencoderConfig
from bagel_jax.models.attention import KV, attend
from bagel_jax.models.layers import precision

NORM_GROUPS = 32


class Pointwise(nnx.Conv):
    """A 1x1 convolution as the matrix product that it is: as a convolution XLA takes four times as long on a CPU."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., width_in]` -> `[..., width_out]`."""
        return jnp.matmul(x, self.kernel[0, 0], precision=self.precision) + self.bias[...]


class GroupNorm(nnx.GroupNorm):
    """`nnx.GroupNorm`, which is three times as fast on a CPU where means are taken over pixels first, then channels."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, width]` -> the same shape; statistics in float32, variance in two passes as PyTorch's."""

        def mean(x):
            by_group = x.mean((1, 2)).reshape(x.shape[0], self.num_groups, -1).mean(-1)
            return jnp.repeat(by_group, x.shape[-1] // self.num_groups, axis=-1)[:, None, None]

        centred = x - mean(x.astype(jnp.float32))
        scale = jax.lax.rsqrt(mean(centred**2) + self.epsilon) * self.scale[...]
        return (centred * scale + self.bias[...]).astype(self.dtype)


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

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, width_in]` -> `[B, h, w, width_out]`."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttentionBlock(nnx.Module):
    """Single-head attention of every pixel to every pixel."""

    def __init__(self, width: int, dtype, rngs: nnx.Rngs):
        self.norm = _group_norm(width, dtype, rngs)
        self.q, self.k, self.v, self.proj_out = (_conv(width, width, 1, dtype, rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, width]` -> the same shape."""
        batch, height, width, channels = x.shape
        h = self.norm(x)
        q, k, v = (p(h).reshape(batch, height * width, 1, channels) for p in (self.q, self.k, self.v))
        kv_end = jnp.full((height * width,), height * width, jnp.int32)
        out = jnp.stack([attend(q[i], KV(k[i], v[i]), kv_end) for i in range(batch)])
        return x + self.proj_out(out.reshape(x.shape))


class Middle(nnx.Module):
    """The coarsest level: block, attention, block."""

    def __init__(self, width: int, dtype, rngs: nnx.Rngs):
        self.block_1 = ResnetBlock(width, width, dtype, rngs)
        self.attn_1 = AttentionBlock(width, dtype, rngs)
        self.block_2 = ResnetBlock(width, width, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, width]` -> the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nnx.Module):
    """Half the resolution; padded right and bottom only, as in the official code."""

    def __init__(self, width: int, dtype, rngs: nnx.Rngs):
        self.conv = _conv(width, width, 3, dtype, rngs, stride=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, width]` -> `[B, h/2, w/2, width]`."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the resolution: nearest neighbour, then a 3x3 convolution.

    Each of a pixel's four places sees only 2x2 pixels of the low resolution, so that summed kernels give the same with
    16 products where there would be 36.
    """

    def __init__(self, width: int, dtype, rngs: nnx.Rngs):
        self.conv = _conv(width, width, 3, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, width]` -> `[B, 2h, 2w, width]`."""
        batch, height, width, channels = x.shape

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

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, width_in]` -> `[B, h/2, w/2, width_out]`, or at `[h, w]` for the last level."""
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class UpLevel(nnx.Module):
    """Blocks of one resolution, then twice the resolution (but for the finest level)."""

    def __init__(self, width_in: int, width_out: int, num_blocks: int, finest: bool, dtype, rngs: nnx.Rngs):
        widths = [width_in] + [width_out] * num_blocks
        self.block = nnx.List([ResnetBlock(widths[i], width_out, dtype, rngs) for i in range(num_blocks)])
        self.upsample = None if finest else Upsample(width_out, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, width_in]` -> `[B, 2h, 2w, width_out]`, or at `[h, w]` for the finest level."""
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


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

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, 3]` in [-1, 1] -> `[B, h, w, 2C]`: mean and log-variance."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


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

    def __call__(self, z: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, H, W, 3]`, about [-1, 1], not clipped."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class AutoEncoder(nnx.Module):
    """Encoder and decoder, with the shift and scale that the trunk's latents have."""

    def __init__(self, c: AutoencoderConfig, dtype, rngs: nnx.Rngs):
        self.config = c
        self.encoder = Encoder(c, dtype, rngs)
        self.decoder = Decoder(c, dtype, rngs)

    def moments(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`[B, H, W, 3]` in [-1, 1] -> mean and log-variance, each `[B, h, w, C]` float32."""
        mean, log_variance = jnp.split(self.encoder(pixels).astype(jnp.float32), 2, axis=-1)
        return mean, log_variance

    def encode(self, pixels: jax.Array, noise: jax.Array) -> jax.Array:
        """A posterior sample, shifted and scaled.

        Args:
            pixels: `[B, H, W, 3]` in [-1, 1].
            noise: `[B, h, w, C]` standard normal.

        Returns:
            Latents `[B, h, w, C]` float32.
        """
        mean, log_variance = self.moments(pixels)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents `[B, h, w, C]` -> pixels `[B, H, W, 3]` float32, about [-1, 1], not clipped."""
        z = latents / self.config.scale_factor + self.config.shift_factor
        return self.decoder(z).astype(jnp.float32)
