"""The demo world: one plain shape on a plain ground, and all that is said about it.

A `Scene` is an image, a `Combination` the three words for it. Every sentence has one default form, by which a trained
model is judged; where there are others they come after it and are for training only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from bagel_jax.errors import InputError, check_choice

Color = tuple[int, int, int]  # red, green, blue, each of 0 to 255

SIDE = 64  # of an image, in pixels
RADII = (12.0, 22.0)  # least and greatest circumradius, in pixels
SHAPES = ("circle", "square", "triangle", "star")
COLORS: dict[str, Color] = {
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (128, 0, 128),
    "orange": (255, 165, 0),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
# In no image of the training set: to be learnt later, from a handful of images.
NEW_COLORS: dict[str, Color] = {"pink": (255, 192, 203)}
# Yellow and orange are this far apart, the nearest two of COLORS: what a nameless colour keeps from all others.
CLEARLY_APART = 90.0

_NAMES = {rgb: name for name, rgb in (COLORS | NEW_COLORS).items()}
_SUPERSAMPLING = 8
_STAR_WAIST = math.sin(math.pi / 10) / math.sin(3 * math.pi / 10)  # inner by outer radius of a pentagram


class Combination(NamedTuple):
    """What can be said of an image; None stands for a colour without a name."""

    color: str | None
    shape: str
    ground: str | None


COMBINATIONS = tuple(
    Combination(color, shape, ground) for color in COLORS for shape in SHAPES for ground in COLORS if color != ground
)
_HELD_OUT = frozenset(c for c in COMBINATIONS if int(hashlib.sha1(" ".join(c).encode()).hexdigest(), 16) % 7 == 0)


def held_out(color: str | None, shape: str, ground: str | None) -> bool:
    """Whether no training image or text shows this combination; False for what is not in COMBINATIONS."""
    return (color, shape, ground) in _HELD_OUT


# --- Images ---


@dataclass(frozen=True)
class Scene:
    """One image: a shape in a colour on a ground, `radius` and centre (`x`, `y`) of its circumcircle in pixels.

    The left upper corner of the image is (0, 0), the centre of its first pixel (0.5, 0.5); `y` goes down.
    """

    shape: str
    color: Color
    ground: Color
    radius: float
    x: float
    y: float

    @classmethod
    def of(cls, combination: Combination, rng: Random) -> Scene:
        """An image of a combination of names, in random size and place."""
        named = COLORS | NEW_COLORS
        for name in (combination.color, combination.ground):
            check_choice("color", name, list(named))
        return cls(combination.shape, named[combination.color], named[combination.ground], *place(rng))

    @property
    def combination(self) -> Combination:
        """The words for this image."""
        return Combination(_NAMES.get(self.color), self.shape, _NAMES.get(self.ground))


def place(rng: Random) -> tuple[float, float, float]:
    """Random circumradius and centre (x, y) of a shape; a pixel of ground stays free on every side."""
    radius = rng.uniform(*RADII)
    return radius, rng.uniform(radius + 1, SIDE - 1 - radius), rng.uniform(radius + 1, SIDE - 1 - radius)


def distance(a: Color, b: Color) -> float:
    """How far two colours are apart in RGB, from 0 to 442."""
    return math.dist(a, b)


def nameless_color(rng: Random, *others: Color) -> Color:
    """A random colour clearly apart from all that have a name, and from `others`."""
    while True:
        color = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if all(distance(color, other) >= CLEARLY_APART for other in (*_NAMES, *others)):
            return color


def draw(scene: Scene) -> np.ndarray:
    """The image of a scene, uint8 `[64, 64, 3]`, with smooth edges.

    Raises:
        InputError: the shape is none of SHAPES.
    """
    size = (SIDE, SIDE)
    mask = _coverage(scene.shape, scene.radius, scene.x, scene.y)
    return np.asarray(Image.composite(Image.new("RGB", size, scene.color), Image.new("RGB", size, scene.ground), mask))


def coverage(shape: str, radius: float, x: float, y: float) -> np.ndarray:
    """How much of each pixel lies inside a shape, float32 `[64, 64]` of 0 to 1.

    Raises:
        InputError: the shape is none of SHAPES.
    """
    return np.asarray(_coverage(shape, radius, x, y), np.float32) / 255


def _coverage(shape: str, radius: float, x: float, y: float) -> Image.Image:
    check_choice("shape", shape, SHAPES)
    fine = Image.new("L", (SIDE * _SUPERSAMPLING,) * 2)
    # Pillow counts from the centre of the first pixel, and paints the pixels under an outline too.
    x, y, radius = (v * _SUPERSAMPLING - 0.5 for v in (x, y, radius))
    if shape == "circle":
        ImageDraw.Draw(fine).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        ImageDraw.Draw(fine).polygon([(x + radius * u, y + radius * v) for u, v in _CORNERS[shape]], fill=255)
    return fine.reduce(_SUPERSAMPLING)


def _regular(corners: int, turn: float, waist: float | None = None) -> list[tuple[float, float]]:
    """Corners on the unit circle, the first `turn` of a turn clockwise from the top; a star's at its waist too."""
    count = corners if waist is None else 2 * corners
    radii = [1.0 if waist is None or i % 2 == 0 else waist for i in range(count)]
    angles = [2 * math.pi * (turn + i / count) for i in range(count)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


_CORNERS = {"square": _regular(4, 1 / 8), "triangle": _regular(3, 0), "star": _regular(5, 0, _STAR_WAIST)}


# --- Captions and edits ---


def with_article(words: str) -> str:
    """`words` after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(c: Combination) -> str:
    """For example "a red circle on an orange background"."""
    return f"{with_article(f'{c.color} {c.shape}')} on {with_article(f'{c.ground} background')}"


def prompts(c: Combination) -> tuple[str, ...]:
    """What asks for the image of a combination, the caption first."""
    return caption(c), f"draw {caption(c)}", f"{with_article(f'{c.color} {c.shape}')} on {c.ground}"


def plan(c: Combination) -> str:
    """What is thought before the image is made."""
    return f"<think>{with_article(c.shape)}, {c.color}, on {c.ground}</think>"


@dataclass(frozen=True)
class Edit:
    """New names for some attributes (None: untouched): of one, or of colour and shape.

    Raises:
        InputError: other attributes together, or names that are not in the world.
    """

    color: str | None = None
    shape: str | None = None
    ground: str | None = None

    def __post_init__(self):
        if self.kind not in EDIT_KINDS:
            raise InputError(f"an edit of {self.kind or 'nothing'} has no words; it must be of {', '.join(EDIT_KINDS)}")
        for value, choices in ((self.color, COLORS), (self.shape, SHAPES), (self.ground, COLORS)):
            if value is not None:
                check_choice("edit", value, tuple(choices))

    @property
    def kind(self) -> str:
        """What is edited, one of EDIT_KINDS."""
        return " and ".join(name for name in ("color", "shape", "ground") if getattr(self, name) is not None)

    @property
    def forms(self) -> tuple[str, ...]:
        """The instruction, and other ways to say it."""
        thing = with_article(f"{self.color} {self.shape}")
        return {
            "color": (f"make it {self.color}", f"color it {self.color}", f"change the color to {self.color}"),
            "shape": (f"turn it into a {self.shape}", f"make it a {self.shape}", f"change the shape to a {self.shape}"),
            "ground": (f"change the background to {self.ground}", f"make the background {self.ground}"),
            "color and shape": (f"make it {thing}", f"turn it into {thing}"),
        }[self.kind]

    @property
    def instruction(self) -> str:
        """For example "make it blue"."""
        return self.forms[0]

    def result(self, c: Combination) -> Combination:
        """The words after the edit."""
        return Combination(self.color or c.color, self.shape or c.shape, self.ground or c.ground)

    def apply(self, scene: Scene) -> Scene:
        """The image after the edit; size, place and untouched colours stay."""
        color = COLORS[self.color] if self.color else scene.color
        ground = COLORS[self.ground] if self.ground else scene.ground
        return replace(scene, color=color, shape=self.shape or scene.shape, ground=ground)


EDIT_KINDS = ("color", "shape", "ground", "color and shape")


def edits(c: Combination, kind: str | None = None) -> list[Edit]:
    """All edits (of one of EDIT_KINDS) that change all they name and leave the shape visible on its ground."""
    if kind is None:
        return [edit for each in EDIT_KINDS for edit in edits(c, each)]
    check_choice("kind", kind, EDIT_KINDS)
    colors = [name for name in COLORS if name not in (c.color, c.ground)]
    shapes = [name for name in SHAPES if name != c.shape]
    if kind == "color":
        return [Edit(color=color) for color in colors]
    if kind == "shape":
        return [Edit(shape=shape) for shape in shapes]
    if kind == "ground":
        return [Edit(ground=ground) for ground in colors]
    return [Edit(color=color, shape=shape) for color in colors for shape in shapes]


# --- Questions about an image ---


@dataclass(frozen=True)
class Question:
    """A question in several forms, the default first, and its answer for a combination."""

    forms: tuple[str, ...]
    needs: tuple[str, ...]  # attributes that must have a name
    answer_for: Callable[[Combination], str]

    def answer(self, c: Combination) -> str | None:
        """The answer, or None where something it would name has no name."""
        return None if any(getattr(c, name) is None for name in self.needs) else self.answer_for(c)


QUESTIONS = {
    "caption": Question(("What is in this image?", "Describe this image."), ("color", "ground"), caption),
    "color": Question(
        ("What color is the shape?", "What is the color of the shape?"), ("color",), lambda c: str(c.color)
    ),
    "shape": Question(("What shape is it?", "Which shape is in this image?"), (), lambda c: c.shape),
    "ground": Question(
        ("What color is the background?", "What is the color of the background?"), ("ground",), lambda c: str(c.ground)
    ),
    # Two attributes of three: they part what a model would else learn as one.
    "color and shape": Question(("Describe the shape.",), ("color",), lambda c: with_article(f"{c.color} {c.shape}")),
    "color and ground": Question(
        ("Describe the color and the background.",), ("color", "ground"), lambda c: f"{c.color} on {c.ground}"
    ),
    "shape and ground": Question(
        ("Describe the shape and the background.",),
        ("ground",),
        lambda c: f"{with_article(c.shape)} on {with_article(f'{c.ground} background')}",
    ),
}


# --- Facts without an image ---


class Fact(NamedTuple):
    """A question in several forms, the default first, and its answer."""

    forms: tuple[str, ...]
    answer: str


# fmt: off
CAPITALS = {
    "Algeria": "Algiers", "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna",
    "Belgium": "Brussels", "Bulgaria": "Sofia", "Canada": "Ottawa", "China": "Beijing", "Colombia": "Bogota",
    "Croatia": "Zagreb", "Cuba": "Havana", "Czechia": "Prague", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "Estonia": "Tallinn", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin", "Ghana": "Accra",
    "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi", "Iran": "Tehran",
    "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome", "Japan": "Tokyo", "Jordan": "Amman", "Kenya": "Nairobi",
    "Latvia": "Riga", "Lebanon": "Beirut", "Morocco": "Rabat", "Nepal": "Kathmandu", "Norway": "Oslo", "Peru": "Lima",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest", "Russia": "Moscow", "Senegal": "Dakar",
    "Serbia": "Belgrade", "Spain": "Madrid", "Sweden": "Stockholm", "Syria": "Damascus", "Thailand": "Bangkok",
    "Tunisia": "Tunis", "Turkey": "Ankara", "Ukraine": "Kyiv", "Vietnam": "Hanoi",
}
# fmt: on
_SHAPE_FACTS = {
    "Which shape is round?": "A circle is round.",
    "Which shape has no corners?": "A circle has no corners.",
    "How many corners does a circle have?": "A circle has no corners.",
    "Which shape has four sides?": "A square has four sides.",
    "How many sides does a square have?": "A square has four sides.",
    "How many corners does a square have?": "A square has four corners.",
    "Which shape has three sides?": "A triangle has three sides.",
    "How many sides does a triangle have?": "A triangle has three sides.",
    "How many corners does a triangle have?": "A triangle has three corners.",
    "Which shape has five points?": "A star has five points.",
    "How many points does a star have?": "A star has five points.",
}
_MIXES = {
    ("blue", "yellow"): "green",
    ("red", "yellow"): "orange",
    ("red", "blue"): "purple",
    ("red", "white"): "pink",
}


def facts() -> Iterator[Fact]:
    """All that can be asked without an image: capitals, shapes, mixtures of colours."""
    for country, capital in CAPITALS.items():
        forms = (f"What is the capital of {country}?", f"Which city is the capital of {country}?")
        yield Fact(forms, f"The capital of {country} is {capital}.")
    for question, answer in _SHAPE_FACTS.items():
        yield Fact((question,), answer)
    for pair, mixed in _MIXES.items():
        for a, b in (pair, pair[::-1]):
            forms = (f"What do you get when you mix {a} and {b}?", f"What color do {a} and {b} make?")
            yield Fact(forms, f"{a.capitalize()} and {b} make {mixed}.")
