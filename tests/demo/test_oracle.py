"""benchmarks/oracle.py: it judges the models, so it must be right itself."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from bagel_jax.errors import InputError
from tools.demo.world import COMBINATIONS, NEW_COLORS, SHAPES, Combination, Edit, Scene, draw, nameless_color, place

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "oracle.py"


@pytest.fixture(scope="module")
def oracle():
    spec = importlib.util.spec_from_file_location("oracle", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["oracle"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["oracle"]


def scenes(count: int, seed: int) -> list[Scene]:
    """Random scenes of all combinations; a third each of the least and of the greatest size."""
    rng = Random(seed)
    combinations = [c for _ in range(-(-count // len(COMBINATIONS))) for c in rng.sample(COMBINATIONS, 224)][:count]
    made = [Scene.of(c, rng) for c in combinations]
    made[::3] = [replace(s, radius=12.0) for s in made[::3]]
    made[1::3] = [replace(s, radius=22.0, x=_middle(s.x), y=_middle(s.y)) for s in made[1::3]]
    return made


def _middle(v: float) -> float:
    """The nearest place where a shape of the greatest size fits."""
    return min(max(v, 23.0), 41.0)


def near(reading, scene: Scene) -> bool:
    """Whether centre and size are right to a pixel."""
    return math.dist((reading.x, reading.y), (scene.x, scene.y)) < 1 and abs(reading.radius - scene.radius) < 1


def test_fresh_images(oracle):
    """A right image counted as wrong."""
    for scene in scenes(450, 0):
        reading = oracle.read(draw(scene))
        assert reading.shows(*scene.combination), scene
        assert near(reading, scene), scene
        assert np.allclose(reading.color_rgb, scene.color, atol=1)
        assert np.allclose(reading.ground_rgb, scene.ground, atol=1)


def test_blurred_noisy_images_with_spoiled_corners(oracle):
    """A model's images are never as clean as drawn ones, and its autoencoder spoils the corners."""
    noise, right = np.random.default_rng(0), 0
    made = scenes(450, 1)
    for scene in made:
        image = Image.fromarray(draw(scene)).filter(ImageFilter.GaussianBlur(0.8))
        pixels = np.asarray(image, np.float32) + noise.normal(0, 6, (64, 64, 3))
        pixels = pixels.clip(0, 255).astype(np.uint8)
        pixels[[0, 0, -1, -1], [0, -1, 0, -1]] = noise.integers(0, 256, (4, 3))
        reading = oracle.read(pixels)
        right += reading.shows(*scene.combination) and near(reading, scene)
    assert right / len(made) > 0.99


def test_changed_shape_stays_in_place(oracle):
    """An edit would seem to have moved what it only changed."""
    before = Scene("triangle", (255, 0, 0), (255, 255, 255), 17, 30, 33)
    readings = [oracle.read(draw(Edit(shape=s).apply(before) if s != "triangle" else before)) for s in SHAPES]
    assert all(a.moved(b) < 1 for a in readings for b in readings)
    assert oracle.read(draw(replace(before, x=38))).moved(readings[0]) == pytest.approx(8, abs=1)


def test_colors_beyond_the_palette(oracle):
    """A nameless colour taken for one of the palette, or a new one not known."""
    rng = Random(0)
    for _ in range(50):
        color = nameless_color(rng)
        scene = Scene("star", color, nameless_color(rng, color), *place(rng))
        assert oracle.read(draw(scene)).shows("unclear", "star", "unclear")
    pink = draw(Scene.of(Combination("pink", "circle", "white"), rng))
    assert oracle.read(pink).shows("unclear", "circle", "white")
    assert oracle.read(Image.fromarray(pink), NEW_COLORS).shows("pink", "circle", "white")


def _drawn(paint) -> np.ndarray:
    image = Image.new("RGB", (64, 64), "white")
    paint(ImageDraw.Draw(image))
    return np.asarray(image)


@pytest.mark.parametrize(
    "paint",
    [
        lambda d: None,
        lambda d: d.polygon([(14, 20), (50, 20), (32, 52)], fill="red"),
        lambda d: d.rectangle((10, 25, 54, 39), fill="red"),
        lambda d: d.ellipse((12, 12, 52, 52), outline="red", width=8),
        lambda d: [d.ellipse((x, x, x + 20, x + 20), fill="red") for x in (8, 36)],
        lambda d: d.rounded_rectangle((14, 14, 50, 50), 9, fill="red"),
    ],
    ids=["nothing", "upside down", "slab", "ring", "two", "half round"],
)
def test_what_is_no_shape_is_unclear(oracle, paint):
    """A bad image counted as right."""
    reading = oracle.read(_drawn(paint))
    assert reading.shape == "unclear"
    assert reading.ground == "white"


def test_noise_is_unclear(oracle):
    """Images of a model that has learnt nothing."""
    for seed in range(20):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        assert oracle.read(pixels).shape == "unclear"


def test_wrong_size(oracle):
    """An image of another size is refused, not misread."""
    with pytest.raises(InputError, match=r"\[32, 64, 3\]"):
        oracle.read(np.zeros((32, 64, 3), np.uint8))
