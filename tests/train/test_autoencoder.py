"""The autoencoder's objective, and the scale that its latents are brought to."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training import TINY, tiny_weights, write_config

from bagel_jax.models.weights import fill, flatten
from bagel_jax.placement.mesh import make_mesh
from bagel_jax.train.autoencoder import autoencoder_loss, normalized
from bagel_jax.train.config import ObjectiveTable
from bagel_jax.train.loop import make_loss
from bagel_jax.train.start import make_start
from bagel_jax.train.step import TrainState, make_step


class Fake(NamedTuple):
    """An autoencoder that says what it is told to; without an output, it decodes a latent as itself."""

    mean: np.ndarray
    log_variance: np.ndarray
    out: np.ndarray | None = None

    def moments(self, pixels):
        return jnp.asarray(self.mean), jnp.asarray(self.log_variance)

    def decoder(self, z):
        return z if self.out is None else jnp.asarray(self.out)


def normal(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


KEY = jax.random.key(0)


def test_the_terms():
    """The KL pulls elsewhere than to the standard normal, or its weight is not the configuration's."""
    mean, log_variance, out, pixels = (
        normal(2, 3, 3, 4),
        normal(2, 3, 3, 4, seed=1),
        normal(2, 6, 6, 3),
        normal(2, 6, 6, 3),
    )
    out = out + 1
    total, report = autoencoder_loss(Fake(mean, log_variance, out), pixels, KEY, ObjectiveTable(kl_weight=0.5))
    error = ((out - pixels) ** 2).mean()
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).mean()
    assert float(report["reconstruction"]) == pytest.approx(error, rel=1e-5)
    assert float(report["kl"]) == pytest.approx(kl, rel=1e-5)
    assert float(report["psnr"]) == pytest.approx(10 * np.log10(4 / error), rel=1e-4)
    assert float(total) == pytest.approx(error + 0.5 * kl, rel=1e-5)


def test_only_corners_weigh_more():
    """The corners stay dark, or a whole edge is learned at the cost of the rest."""
    out, pixels = normal(2, 5, 7, 3), normal(2, 5, 7, 3, seed=1)
    fake = Fake(normal(2, 2, 2, 4), normal(2, 2, 2, 4), out)
    _, plain = autoencoder_loss(fake, pixels, KEY, ObjectiveTable())
    _, heavy = autoencoder_loss(fake, pixels, KEY, ObjectiveTable(corner_weight=40.0))
    error = (out - pixels) ** 2
    corners = sum(error[:, y, x].sum() for y in (0, -1) for x in (0, -1))
    assert float(plain["reconstruction"]) == pytest.approx(error.mean(), rel=1e-5)
    assert float(heavy["reconstruction"]) == pytest.approx((error.sum() + 39 * corners) / error.size, rel=1e-5)
    assert float(heavy["psnr"]) == pytest.approx(float(plain["psnr"]))


def test_a_posterior_sample_is_decoded():
    """The decoder learns from means alone, and fails on samples."""
    mean = normal(16, 8, 8, 3)
    _, report = autoencoder_loss(Fake(mean, np.full_like(mean, 2 * np.log(0.3))), mean, KEY, ObjectiveTable())
    assert float(report["reconstruction"]) == pytest.approx(0.09, rel=0.1)


def test_noise_on_latents():
    """The decoder is not used to latents that are a little off, or gets as much noise at every scale of latents."""
    for scale in (1.0, 5.0):
        mean = scale * normal(400, 4, 4, 3)
        still = np.full_like(mean, -60)
        _, report = autoencoder_loss(Fake(mean, still), mean, KEY, ObjectiveTable(latent_noise=0.6))
        # A level drawn evenly from 0 to 0.6 an image, in deviations: the mean of its square is a third of 0.36.
        assert float(report["reconstruction"]) == pytest.approx(0.12 * scale**2, rel=0.15)
    _, report = autoencoder_loss(Fake(mean, still), mean, KEY, ObjectiveTable())
    assert float(report["reconstruction"]) == pytest.approx(0, abs=1e-9)


def smooth(count, side=16):
    """Images of colour gradients."""
    t = np.linspace(-1, 1, side)
    generator = np.random.RandomState(0)
    planes = [[a * t[:, None] + b * t[None] for a, b in generator.uniform(-0.5, 0.5, (3, 2))] for _ in range(count)]
    return np.asarray(planes, np.float32).transpose(0, 2, 3, 1)


@pytest.mark.slow
def test_loss_falls(tmp_path):
    """The autoencoder does not learn, or the trunk learns along."""
    c, _ = write_config(tmp_path, objective={"kind": "autoencoder"})
    start = make_start(c, make_mesh())
    assert all(path.startswith("autoencoder.") for path in start.trainable)
    optimizer = optax.adam(3e-3)
    step = make_step(make_loss(c, start, make_mesh()), optimizer, ema=0.9, seed=0)
    state, reports = TrainState.create(start.trainable, optimizer), []
    pixels = smooth(2)[None]
    for _ in range(30):
        state, report = step(state, start.frozen, pixels)
        reports.append({name: float(value) for name, value in report.items()})
    assert reports[-1]["loss"] < 0.5 * reports[0]["loss"]
    assert reports[-1]["psnr"] > reports[0]["psnr"]


@jax.jit
def both_ways(params, pixels):
    """Latents and deviations of images, and the images again."""
    autoencoder = nnx.merge(tiny_weights().graph, params).autoencoder
    latents = autoencoder.encode(pixels, jnp.zeros((*[s // 2 for s in pixels.shape[1:3]], 4)))
    _, log_variance = autoencoder.moments(pixels)
    return latents, jnp.exp(0.5 * log_variance), autoencoder.decode(latents)


def test_normalized_latents_have_unit_variance_and_the_same_images():
    """A new autoencoder's latents are at a scale that noise of unit variance drowns, or its images change."""
    pixels = smooth(8) + 0.1 * normal(8, 16, 16, 3)
    params = flatten(tiny_weights().params)
    latents, spread, out = both_ways(tiny_weights().params, pixels)
    scale = TINY.autoencoder.scale_factor
    deviation = jnp.std(latents, axis=(0, 1, 2)) / scale  # of the means, before the factor
    changed = normalized(params, deviation, scale)
    assert {name for name in params if not np.array_equal(changed[name], params[name])} == {
        "autoencoder.encoder.conv_out.kernel",
        "autoencoder.encoder.conv_out.bias",
        "autoencoder.decoder.conv_in.kernel",
    }
    ours, our_spread, again = both_ways(fill(tiny_weights(), changed).params, pixels)
    assert np.abs(np.asarray(deviation) * scale - 1).max() > 0.1
    np.testing.assert_allclose(jnp.std(ours, axis=(0, 1, 2)), 1, rtol=1e-3)
    np.testing.assert_allclose(again, out, rtol=1e-3, atol=1e-3)
    # Samples of the posterior are as far from its mean as they were, in the new unit.
    np.testing.assert_allclose(our_spread, spread / (deviation * scale), rtol=1e-3)
