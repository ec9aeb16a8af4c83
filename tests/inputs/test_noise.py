"""The random numbers of a request."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
from golden import DATA
from small import CONFIG, model, random_image

from bagel_jax.inputs import noise
from bagel_jax.inputs.prepare import prepare
from bagel_jax.options import DEFAULTS, NoiseSource
from bagel_jax.request import Request

SOURCES = get_args(NoiseSource)


def prepared(modality, *args, **kwargs):
    return prepare(Request.create(modality, *args, **kwargs), CONFIG, model().tokenizer)


SEEDS = 0, 1, 2, 3, 7, 42, 1234, 2**31 - 1, 2**31, 2**32 - 1
SIZES = 1, 7, 15, 16, 17, 24, 33, 64, 1000, 4096 * 64
CALLS = 7, 16, 1, 33, 2, 15
TOLERANCE = 1e-6  # a unit in the last place of the largest values, 5, is half of it


@pytest.fixture(scope="module")
def pytorch() -> dict[str, np.ndarray]:
    """What PyTorch 2.13.0 gives on a CPU with AVX2 or AVX-512, for each of `SEEDS` a row.

    Stored by this, run in the repository's root:

        import numpy, torch

        def drawn(*sizes):
            rows = []
            for seed in SEEDS:
                torch.manual_seed(seed)
                rows.append(numpy.concatenate([torch.randn(n).numpy() for n in sizes]))
            return numpy.stack(rows)

        arrays = {"seeds": SEEDS, "calls": drawn(*CALLS)}
        for n in SIZES:
            x = drawn(n)
            arrays |= {f"first_{n}": x[:, :24], f"last_{n}": x[:, -24:], f"sum_{n}": x.astype(float).sum(1)}
        numpy.savez_compressed("tests/data/randn.npz", **arrays)
    """
    with np.load(DATA / "randn.npz") as arrays:
        assert tuple(arrays["seeds"]) == SEEDS
        return dict(arrays)


@pytest.mark.parametrize("size", SIZES)
def test_numbers_are_pytorchs(pytorch, size):
    """A seed from the official app, a paper or another engine makes another image here."""
    for i, seed in enumerate(SEEDS):
        x = noise.TorchNormal(seed)(size)
        assert x.dtype == np.float32
        np.testing.assert_allclose(x[:24], pytorch[f"first_{size}"][i], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(x[-24:], pytorch[f"last_{size}"][i], rtol=0, atol=TOLERANCE)
        # What is in between: one other number changes the sum by far more.
        assert abs(x.astype(np.float64).sum() - pytorch[f"sum_{size}"][i]) < 5e-4


def test_calls_go_on_where_the_last_one_ended(pytorch):
    """Every draw begins the stream anew, or half a pair of a short one is lost, drawn twice, or used by a long one."""
    for seed, wanted in zip(SEEDS, pytorch["calls"], strict=True):
        normal = noise.TorchNormal(seed)
        parts = [normal(n) for n in CALLS]
        np.testing.assert_allclose(np.concatenate(parts), wanted, rtol=0, atol=TOLERANCE)


def test_shapes():
    """Rows of a latent are filled in another order than PyTorch's."""
    flat = noise.TorchNormal(5)(2 * 3 * 8)
    assert np.array_equal(noise.TorchNormal(5)(2, 3, 8), flat.reshape(2, 3, 8))
    assert noise.TorchNormal(5)(0, 4).shape == (0, 4)


def test_official_draws_come_from_one_stream():
    """The latent of an edit begins the stream again, or posterior samples have their channels last."""
    image_shapes = [(4, 6, 16), (2, 4, 16)]
    posterior, latent = noise.draw("official", 42, (6, 64), [42, 42], image_shapes)
    normal = noise.TorchNormal(42)
    for sample, (height, width, channels) in zip(posterior, image_shapes, strict=True):
        assert np.array_equal(sample, normal(channels, height, width).transpose(1, 2, 0))
    assert np.array_equal(latent, normal(6, 64))


def test_images_with_seeds_of_their_own():
    """An image of an earlier turn of a session gets another posterior sample in every turn."""
    image_shapes = [(4, 6, 16), (2, 4, 16), (2, 2, 16)]
    posterior, latent = noise.draw("official", 8, (6, 64), [7, 8, 7], image_shapes)
    seven, eight = noise.TorchNormal(7), noise.TorchNormal(8)
    assert np.array_equal(posterior[0], seven(16, 4, 6).transpose(1, 2, 0))
    assert np.array_equal(posterior[1], eight(16, 2, 4).transpose(1, 2, 0))
    assert np.array_equal(posterior[2], seven(16, 2, 2).transpose(1, 2, 0))
    assert np.array_equal(latent, eight(6, 64))


def test_the_default_is_the_official_apps():
    """Seeds mean something else for whoever gives no option."""
    assert {settings.noise for settings in DEFAULTS.values()} == {"official"}
    usual, named = (prepared("img2img", "a", random_image(), **options) for options in ({}, {"noise": "official"}))
    assert np.array_equal(usual.initial_latent, named.initial_latent)


@pytest.mark.parametrize("source", SOURCES)
def test_requests_say_which_noise(source):
    """The setting is checked, printed and not obeyed."""
    request = prepared("img2img", "a", random_image(), seed=9, noise=source)
    (sample,), latent = noise.draw(source, 9, (64, CONFIG.latent_dim), [9], [request.posterior_noise[0].shape])
    assert np.array_equal(request.posterior_noise[0], sample)
    assert np.array_equal(request.initial_latent, latent)
    request = prepared("img2img", "a", random_image(), seed=9, noise=source, image_seeds=[5])
    (sample,), latent = noise.draw(source, 9, (64, CONFIG.latent_dim), [5], [request.posterior_noise[0].shape])
    assert np.array_equal(request.posterior_noise[0], sample)
    assert np.array_equal(request.initial_latent, latent)


@pytest.mark.parametrize(
    ("source", "small", "full", "largest", "first"),
    [
        (
            "official",
            [-1.1258398294448853, -1.152360200881958, -0.2505785822868347, -0.8436768054962158],
            [1.9269154071807861, 1.4872840642929077, 0.9007171988487244, -2.3294169902801514],
            [1.2197630405426025, -0.3929794728755951, 1.0230751037597656, -0.3734211325645447],
            [
                [1.9269154071807861, 1.27912437915802, -0.9138230085372925],
                [0.6663738489151001, 0.9446058869361877, -0.4939993619918823],
            ],
        ),
        (
            "numpy",
            [-0.36259031295776367, -0.4159747362136841, 0.9548649191856384, -0.9570054411888123],
            [-0.8884850740432739, 1.4608831405639648, -2.3710925579071045, 1.299867033958435],
            [0.6403854489326477, -0.3158780038356781, 0.5245844125747681, -2.0142619609832764],
            [
                [-0.7547945976257324, 1.0279476642608643, -0.7234341502189636],
                [-1.0605757236480713, -1.4788342714309692, -1.146439552307129],
            ],
        ),
    ],
)
def test_regression_30_the_streams_are_frozen(source, small, full, largest, first):
    """The same seed makes another image after an unrelated change of where noise is drawn."""
    _, x = noise.draw(source, 0, (4, 8))
    assert x.dtype == np.float32
    assert [*x[0, :3].tolist(), x[3, 7]] == small
    _, x = noise.draw(source, 42, (4096, 64))
    assert [*x[0, :3].tolist(), x[-1, -1]] == full
    _, x = noise.draw(source, 2**32 - 1, (2, 2))
    assert x.ravel().tolist() == largest
    samples, _ = noise.draw(source, 0, (1, 1), [42, 42], [(4, 6, 16)] * 2)
    assert [sample[0, 0, :3].tolist() for sample in samples] == first


@pytest.mark.parametrize("source", SOURCES)
def test_regression_30_noise_depends_on_seed_and_shapes_alone(source):
    """A reworded prompt, a thought or a negative prompt makes a wholly other image for the same seed."""
    options = {"seed": 7, "noise": source}
    first = prepared("text2img", "a", height=32, width=32, **options)
    for request in (
        prepared("text2img", "another prompt", height=32, width=32, **options, steps=7, cfg_text_scale=1.0),
        prepared("text2img", "a", height=32, width=32, **options, think=True, negative_prompt="b"),
        prepared("text2img", "a", **options),
    ):
        assert np.array_equal(request.initial_latent, first.initial_latent)
    first = prepared("img2img", "a", random_image(), **options)
    other = prepared("img2img", "another prompt", random_image(1), **options, think=True, do_sample=True)
    assert np.array_equal(other.initial_latent, first.initial_latent)
    assert np.array_equal(other.posterior_noise, first.posterior_noise)


@pytest.mark.parametrize("source", SOURCES)
def test_regression_30_another_image_changes_nothing_before_it(source):
    """A second image changes how the first one is encoded."""
    one = prepared("img2img", "a", random_image(), seed=7, noise=source)
    two = prepared("img2img", "another", [random_image(), random_image(1, 40, 20)], seed=7, noise=source)
    assert np.array_equal(one.posterior_noise[0], two.posterior_noise[0])


@pytest.mark.parametrize("source", SOURCES)
def test_draws_differ(source):
    """All requests start from the same noise, or two images share theirs."""
    draws = []
    for seed in (0, 1):
        samples, latent = noise.draw(source, seed, (16, 4), [seed] * 2, [(4, 4, 4)] * 2)
        draws += [latent, *(sample.reshape(16, 4) for sample in samples)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.5
    assert noise.draw(source, 0, (1, 1), [0], [(2, 3, 5)])[0][0].shape == (2, 3, 5)


@pytest.mark.parametrize("source", SOURCES)
def test_noise_is_standard_normal(source):
    """Images are washed out or burnt: the noise is too weak or too strong."""
    _, x = noise.draw(source, 3, (4096, 64))
    assert abs(x.mean()) < 0.01
    assert x.std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("source", SOURCES)
def test_nobody_elses_generator_is_touched(source):
    """Noise depends on, or changes, the random state of the program around it."""
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first = noise.draw(source, 0, (4, 4))[1]
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.rand(9)
    assert np.array_equal(noise.draw(source, 0, (4, 4))[1], first)


def test_regression_31_devices_do_not_matter():
    """On a mesh every device draws noise of its own, or other noise than a single device."""
    code = (
        "import os; os.environ.update(JAX_PLATFORMS='cpu', XLA_FLAGS='--xla_force_host_platform_device_count=4')\n"
        "import jax; assert jax.device_count() == 4\n"
        "from bagel_jax.inputs import noise; print(noise.draw('official', 42, (8, 8))[1].tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == noise.draw("official", 42, (8, 8))[1].tobytes().hex()
