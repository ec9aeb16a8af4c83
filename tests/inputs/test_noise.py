"""The random numbers of a request."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from small import CONFIG, model, random_image

from bagel_jax.inputs import noise
from bagel_jax.inputs.prepare import prepare
from bagel_jax.request import Request


def prepared(modality, *args, **kwargs):
    return prepare(Request.create(modality, *args, **kwargs), CONFIG, model().tokenizer)


def test_regression_30_the_stream_is_frozen():
    """The same seed makes another image after an unrelated change of where noise is drawn."""
    small = noise.initial_latent(0, 4, 8)
    assert small.dtype == np.float32
    assert small[0, :3].tolist() == [-0.36259031295776367, -0.4159747362136841, 0.9548649191856384]
    assert small[3, 7] == np.float32(-0.9570054411888123)
    full = noise.initial_latent(42, 4096, 64)
    assert full[0, :3].tolist() == [-0.8884850740432739, 1.4608831405639648, -2.3710925579071045]
    assert full[-1, -1] == np.float32(1.299867033958435)
    assert noise.initial_latent(2**32 - 1, 2, 2).ravel().tolist() == [
        0.6403854489326477,
        -0.3158780038356781,
        0.5245844125747681,
        -2.0142619609832764,
    ]
    first = [noise.posterior(42, i, 4, 6, 16)[0, 0, :3].tolist() for i in (0, 1)]
    assert first == [
        [-0.7547945976257324, 1.0279476642608643, -0.7234341502189636],
        [-1.0605757236480713, -1.4788342714309692, -1.146439552307129],
    ]


def test_regression_30_noise_depends_on_seed_and_shape_alone():
    """A reworded prompt, a thought or a negative prompt makes a wholly other image for the same seed."""
    wanted = noise.initial_latent(7, 64, CONFIG.latent_dim)
    kwargs = {"height": 32, "width": 32, "seed": 7}
    for request in (
        prepared("text2img", "a", **kwargs),
        prepared("text2img", "another prompt", **kwargs, steps=7, cfg_text_scale=1.0),
        prepared("text2img", "a", **kwargs, think=True, negative_prompt="b"),
        prepared("text2img", "a", seed=7),
        prepared("img2img", "a", random_image(), seed=7),
        prepared("img2img", "a", [random_image(1), random_image(2)], seed=7, think=True),
    ):
        assert np.array_equal(request.initial_latent, wanted)


def test_regression_30_posterior_depends_on_the_image_number_alone():
    """A second image changes how the first one is encoded."""
    one = prepared("img2img", "a", random_image(), seed=7)
    two = prepared("img2img", "another", [random_image(), random_image(1, 40, 20)], seed=7)
    assert np.array_equal(one.posterior_noise[0], two.posterior_noise[0])
    assert np.array_equal(two.posterior_noise[1], noise.posterior(7, 1, *two.posterior_noise[1].shape))


def test_draws_differ():
    """All requests start from the same noise, or two images share theirs."""
    draws = [
        noise.initial_latent(0, 16, 4),
        noise.initial_latent(1, 16, 4),
        noise.posterior(0, 0, 4, 4, 4).reshape(16, 4),
        noise.posterior(0, 1, 4, 4, 4).reshape(16, 4),
        noise.posterior(1, 0, 4, 4, 4).reshape(16, 4),
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.5
    assert noise.posterior(0, 0, 2, 3, 5).shape == (2, 3, 5)


def test_noise_is_standard_normal():
    """Images are washed out or burnt: the noise is too weak or too strong."""
    x = noise.initial_latent(3, 4096, 64)
    assert abs(x.mean()) < 0.01
    assert x.std() == pytest.approx(1, abs=0.01)


def test_nobody_elses_generator_is_touched():
    """Noise depends on, or changes, the random state of the program around it."""
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first = noise.initial_latent(0, 4, 4)
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.rand(9)
    assert np.array_equal(noise.initial_latent(0, 4, 4), first)


def test_regression_31_devices_do_not_matter():
    """On a mesh every device draws noise of its own, or other noise than a single device."""
    code = (
        "import os; os.environ.update(JAX_PLATFORMS='cpu', XLA_FLAGS='--xla_force_host_platform_device_count=4')\n"
        "import jax; assert jax.device_count() == 4\n"
        "from bagel_jax.inputs import noise; print(noise.initial_latent(42, 8, 8).tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == noise.initial_latent(42, 8, 8).tobytes().hex()
