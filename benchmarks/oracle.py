"""Reads an image of the demo world from its pixels alone: which shape, which colours, where, how large.

    python benchmarks/oracle.py IMAGE...

It knows the palette and what the shapes look like, and nothing of the model that made the image.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1]))

from bagel_jax.errors import InputError
from tools.demo.world import COLORS, NEW_COLORS, SHAPES, SIDE, Color, coverage

UNCLEAR = "unclear"
# A colour counts as the nearest of the palette up to this distance in RGB. Nameless colours of the training set keep 90
# from the palette, so they are unclear.
COLOR_LIMIT = 60.0
# Of the area that what is seen and an ideal shape cover together, the part that both cover. The nearest shape needs so
# much, and so much more than the next: a circle and a square share 0.83, and a thing between them 0.9 with both.
SHAPE_LIMIT = 0.8
SHAPE_LEAD = 0.05
# Holes and other pieces may have this part of the shape's area; with more the image is not one plain shape.
STRAY_LIMIT = 0.2

_RING = 2  # pixels of border that show the ground
_CONTRAST = 40.0  # in RGB; what differs less from the ground is no shape
# The smallest star covers 4 % of the image, so beyond this percentile there are only pixels of the shape.
_SHAPE_PERCENTILE = 98.0
_AREA = {  # of a shape with circumradius 1
    "circle": math.pi,
    "square": 2.0,
    "triangle": 3 * math.sqrt(3) / 4,
    "star": 10 * math.sin(math.pi / 5) * math.sin(math.pi / 10) / math.sin(3 * math.pi / 10) / 2,
}


@dataclass(frozen=True)
class Reading:
    """What an image shows; lengths in pixels, (0, 0) is its left upper corner.

    Names are "unclear" where nothing known is near; where no shape is seen at all, place and size are not a number.
    """

    shape: str
    color: str
    ground: str
    x: float  # centre of the circumcircle
    y: float
    radius: float  # of the circumcircle
    color_rgb: tuple[float, float, float]
    ground_rgb: tuple[float, float, float]

    def shows(self, color: str, shape: str, ground: str) -> bool:
        """Whether all three names are right."""
        return (self.color, self.shape, self.ground) == (color, shape, ground)

    def moved(self, other: Reading) -> float:
        """Distance of the two centres in pixels; not a number if one shows no shape."""
        return math.dist((self.x, self.y), (other.x, other.y))


def read(image: Image.Image | np.ndarray, more_colors: Mapping[str, Color] | None = None) -> Reading:
    """Reads an image.

    Args:
        image: 64 x 64 pixels; an array is uint8 `[64, 64, 3]`.
        more_colors: names and values beyond the palette, such as NEW_COLORS.

    Raises:
        InputError: the image has another size.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, np.float32)
    if pixels.shape != (SIDE, SIDE, 3):
        raise InputError(f"the image has shape {list(pixels.shape)}; the oracle reads {[SIDE, SIDE, 3]}")
    palette = COLORS | dict(more_colors or {})

    border = np.ones((SIDE, SIDE), bool)
    border[_RING:-_RING, _RING:-_RING] = False
    ground = np.median(pixels[border], axis=0)  # the autoencoder spoils the corners; a median does not mind
    contrast = np.where(border, 0, np.linalg.norm(pixels - ground, axis=-1))
    peak = np.percentile(contrast, _SHAPE_PERCENTILE)
    color = np.median(pixels[contrast >= 0.8 * peak], axis=0)
    inside = np.linalg.norm(pixels - color, axis=-1) < np.linalg.norm(pixels - ground, axis=-1)
    if peak < _CONTRAST or not inside.any():
        nowhere = (math.nan,) * 3
        return Reading(UNCLEAR, UNCLEAR, _name(ground, palette), *nowhere, nowhere, _rgb(ground))

    mask = _largest_piece(inside)
    core = ndimage.binary_erosion(mask)
    color = np.median(pixels[core if core.any() else mask], axis=0)
    shape, x, y, radius = _fit(mask)
    if (inside ^ mask).sum() > STRAY_LIMIT * mask.sum():
        shape = UNCLEAR
    return Reading(shape, _name(color, palette), _name(ground, palette), x, y, radius, _rgb(color), _rgb(ground))


def _rgb(color: np.ndarray) -> tuple[float, float, float]:
    return tuple(float(value) for value in color)


def _name(color: np.ndarray, palette: Mapping[str, Color]) -> str:
    far, name = min((math.dist(color, value), name) for name, value in palette.items())
    return name if far <= COLOR_LIMIT else UNCLEAR


def _largest_piece(inside: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask, without holes."""
    labels, _ = ndimage.label(inside)
    sizes = np.bincount(labels.ravel())[1:]
    return ndimage.binary_fill_holes(labels == 1 + int(sizes.argmax()))


def _fit(mask: np.ndarray) -> tuple[str, float, float, float]:
    """The shape that shares most with a mask, its circumcentre (x, y) and circumradius.

    All four shapes are regular, so that the centre of gravity is the circumcentre, and the area gives the radius.
    """
    area = mask.sum()
    rows, columns = np.nonzero(mask)
    x, y = float(columns.mean() + 0.5), float(rows.mean() + 0.5)
    fits = []
    for shape in SHAPES:
        radius = math.sqrt(area / _AREA[shape])
        ideal = coverage(shape, radius, x, y) > 0.5
        fits.append((float((ideal & mask).sum() / (ideal | mask).sum()), shape, radius))
    (second, _, _), (first, shape, radius) = sorted(fits)[-2:]
    return shape if first >= SHAPE_LIMIT and first - second >= SHAPE_LEAD else UNCLEAR, x, y, radius


def main() -> int:
    """Prints a line for each image; returns the exit code: 0, or 2 for bad input."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="64 x 64 pixels")
    for path in p.parse_args().images:
        try:
            with Image.open(path) as image:
                r = read(image, NEW_COLORS)
        except (OSError, InputError) as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            return 2
        print(f"{path}: {r.color} {r.shape} on {r.ground}, centre ({r.x:.1f}, {r.y:.1f}), radius {r.radius:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
