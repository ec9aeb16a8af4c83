"""Images encoded once, and kept."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small import lying
from training import TINY, draw_images, random_image, tiny_weights

from bagel_jax.errors import InputError
from bagel_jax.inputs.images import prepare_image
from bagel_jax.models.weights import Weights, fill, flatten
from bagel_jax.train import latents
from bagel_jax.train.latents import encode_images

LARGE = dataclasses.replace(TINY, max_latent_size=8)  # images of 32 pixels


@pytest.fixture
def paths(tmp_path):
    """Five images of three shapes."""
    names = [*draw_images(tmp_path, 3, (32, 32)), *draw_images(tmp_path, 1, (32, 16))]
    names += draw_images(tmp_path, 1, (16, 32))
    return [str(tmp_path / name) for name in names]


@pytest.fixture
def encoded(monkeypatch):
    """Shapes of what goes through the encoder."""
    shapes, moments = [], latents.moments

    def counting(graph, params, pixels):
        shapes.append(pixels.shape)
        return moments(graph, params, pixels)

    monkeypatch.setattr(latents, "moments", counting)
    return shapes


def encode(paths, folder, config=LARGE, weights=None):
    return encode_images(paths, weights or tiny_weights(), config, folder, quiet=True)


def expected(path, config=LARGE):
    """Mean and deviation, straight from the autoencoder."""
    pixels = prepare_image(Image.open(path), config).vae_pixels
    mean, log_variance = tiny_weights().model().autoencoder.moments(pixels[None])
    return np.asarray(mean[0]), np.exp(0.5 * np.asarray(log_variance[0]))


def test_a_store_holds_what_the_autoencoder_gives(tmp_path, paths, encoded, monkeypatch):
    """The model learns the latents of another image, or of the padding of the last batch."""
    monkeypatch.setattr(latents, "_MOST", 2)
    store = encode(paths, tmp_path / "cache")
    assert sorted(encoded) == [(2, 16, 32, 3), (2, 32, 16, 3), (2, 32, 32, 3), (2, 32, 32, 3)]
    assert [store.read(path)[0].shape for path in paths] == [(16, 16, 4)] * 3 + [(8, 16, 4), (16, 8, 4)]
    for path in paths:
        for ours, theirs in zip(store.read(path), expected(path), strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_worker_gets_it_without_the_files(tmp_path, paths):
    """Each worker process is sent all latents, or cannot start."""
    store = encode(paths[:2], tmp_path / "cache")
    mean, _ = store.read(paths[1])
    sent = pickle.dumps(store)
    assert len(sent) < mean.nbytes
    np.testing.assert_array_equal(pickle.loads(sent).read(paths[1])[0], mean)


def test_photos_are_encoded_upright(tmp_path):
    """A phone's photo is learned lying, while it is understood upright."""
    image = random_image(width=32, height=16)
    image.save(tmp_path / "upright.png")
    paths = [str(tmp_path / "upright.png"), *map(str, lying(tmp_path, image))]
    store = encode(paths, tmp_path / "cache")
    for path in paths[1:]:
        np.testing.assert_array_equal(store.read(path)[0], store.read(paths[0])[0])


def test_each_image_is_encoded_once(tmp_path, paths, encoded):
    """Every start of a run encodes everything anew, or none of what has changed since."""
    encode(paths[:2], tmp_path / "cache")
    assert [shape[0] for shape in encoded] == [2]
    encode(paths[:2], tmp_path / "cache")
    assert len(encoded) == 1
    before = encode(paths[:3], tmp_path / "cache")
    assert [shape[0] for shape in encoded] == [2, 1]
    kept = [before.read(path)[0] for path in paths[:3]]
    random_image(9, 32, 32).save(paths[1])
    os.utime(paths[1], ns=(0, Path(paths[1]).stat().st_mtime_ns + 1_000_000))  # clocks may be coarse
    after = encode(paths[:3], tmp_path / "cache")
    assert [shape[0] for shape in encoded] == [2, 1, 1]
    np.testing.assert_array_equal(after.read(paths[0])[0], kept[0])
    np.testing.assert_array_equal(after.read(paths[2])[0], kept[2])
    np.testing.assert_allclose(after.read(paths[1])[0], expected(paths[1])[0], rtol=1e-3, atol=1e-3)
    assert np.abs(after.read(paths[1])[0] - kept[1]).max() > 0.1


def test_another_model_has_its_own(tmp_path, paths, encoded):
    """A model learns from the latents of another autoencoder, or of images of another size."""
    first = encode(paths[:1], tmp_path / "cache")
    arrays = flatten(tiny_weights().params)
    name = "autoencoder.encoder.conv_out.bias"
    other: Weights = fill(tiny_weights(), arrays | {name: arrays[name] + 1})
    second = encode(paths[:1], tmp_path / "cache", weights=other)
    small = encode(paths[:1], tmp_path / "cache", config=TINY)
    assert len(encoded) == 3
    np.testing.assert_allclose(second.read(paths[0])[0], first.read(paths[0])[0] + 1, rtol=5e-3, atol=5e-3)
    assert small.read(paths[0])[0].shape == (8, 8, 4)
    # But what only the trunk or the decoder are, does not matter.
    name = "autoencoder.decoder.conv_in.bias"
    encode(paths[:1], tmp_path / "cache", weights=fill(tiny_weights(), arrays | {name: jnp.ones_like(arrays[name])}))
    assert len(encoded) == 3


def test_an_interrupted_run_leaves_no_half_written_index(tmp_path, paths, monkeypatch):
    """A run that was killed while it wrote what it had encoded cannot be started again."""
    cache = tmp_path / "cache"
    encode(paths[:1], cache)
    with monkeypatch.context() as m:
        m.setattr(latents.json, "dumps", lambda known: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode(paths[:2], cache)
    store = encode(paths[:2], cache)
    for path in paths[:2]:
        np.testing.assert_allclose(store.read(path)[0], expected(path)[0], rtol=1e-3, atol=1e-3)


def test_a_image_that_cannot_be_read_is_named(tmp_path, paths):
    """One bad file among a million ends in a traceback without its name."""
    with pytest.raises(InputError, match=r"nothing\.png does not exist"):
        encode([paths[0], str(tmp_path / "nothing.png")], tmp_path / "cache")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bad\.png cannot be read"):
        encode([str(tmp_path / "bad.png")], tmp_path / "cache")
