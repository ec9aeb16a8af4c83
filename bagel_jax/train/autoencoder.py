"""Training of the autoencoder: reconstruction and KL.

The official code ships no training of it; this is the plain variational autoencoder of the latent diffusion paper
(https://arxiv.org/abs/2112.10752) without its perceptual and adversarial losses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bagel_jax.models.autoencoder import AutoEncoder
from bagel_jax.train.config import ObjectiveTable


def autoencoder_loss(
    model: AutoEncoder, pixels: jax.Array, key: jax.Array, o: ObjectiveTable
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error of the decoded posterior sample, and KL of the posterior to the standard normal.

    Args:
        model: encoder and decoder.
        pixels: `[B, H, W, 3]` in [-1, 1].
        key: of the posterior's noise.
        o: `kl_weight` (of the KL's mean over latent numbers), `corner_weight`, `latent_noise`.
    """
    posterior_key, noise_key, level_key = jax.random.split(key, 3)
    mean, log_variance = model.moments(pixels)
    z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(posterior_key, mean.shape)
    if o.latent_noise:
        level = o.latent_noise * jax.random.uniform(level_key, (z.shape[0], 1, 1, 1))
        deviation = jax.lax.stop_gradient(jnp.std(mean))
        z = z + level * deviation * jax.random.normal(noise_key, z.shape)
    out = model.decoder(z.astype(pixels.dtype)).astype(jnp.float32)
    height, width = pixels.shape[1:3]
    weight = jnp.ones((height, width)).at[jnp.array([0, 0, -1, -1]), jnp.array([0, -1, 0, -1])].set(o.corner_weight)
    error = jnp.square(out - pixels.astype(jnp.float32))
    reconstruction = jnp.mean(error * weight[:, :, None])
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    report = {"reconstruction": reconstruction, "kl": kl, "psnr": 10 * jnp.log10(4 / jnp.mean(error))}
    return reconstruction + o.kl_weight * kl, report


def normalized(params: dict[str, jax.Array], deviation: jax.Array, scale_factor: float) -> dict[str, jax.Array]:
    """The autoencoder with each latent channel scaled so that `encode` gives unit variance; its images stay.

    The published model's factor suits the published autoencoder; a new one comes out at any scale.

    Args:
        params: parameters by path, among them the encoder's last and the decoder's first convolution.
        deviation: `[C]` standard deviation of each channel's mean over many images.
        scale_factor: what `AutoEncoder.encode` multiplies by.
    """
    factor = 1 / (deviation * scale_factor)
    last, first = "autoencoder.encoder.conv_out", "autoencoder.decoder.conv_in"
    c = deviation.shape[0]
    out = dict(params)
    out[f"{last}.kernel"] = params[f"{last}.kernel"].at[..., :c].multiply(factor)
    out[f"{last}.bias"] = params[f"{last}.bias"].at[:c].multiply(factor).at[c:].add(2 * jnp.log(factor))
    out[f"{first}.kernel"] = params[f"{first}.kernel"] / factor[:, None]
    return out
