"""Sizes that programs are compiled for: those of the autoencoder's grids."""

from __future__ import annotations

import pytest

from bagel_jax.buckets import grids, padded_grid
from bagel_jax.config import ImageTransform
from bagel_jax.errors import InputError
from bagel_jax.inputs.images import resized_size

# What images of these heights and widths in pixels become in the published model, in tokens of 16 pixels.
SIDES = [*range(1, 64), *range(64, 1100, 13), 1500, 3000, 10_000, 50_000]
RESIZE = ImageTransform(1024, 512, 16)


@pytest.mark.parametrize("limit", [1, 3, 4, 8, 16, 50, 64, 100])
def test_padded_grid(limit):
    """A grid is cut, or padded to what costs far more; or grids are padded to what nobody has compiled."""
    sides = range(1, limit + 1)
    padded = {(rows, columns): padded_grid(rows, columns, limit) for rows in sides for columns in sides}
    for grid, larger in padded.items():
        for side, padded_side in zip(grid, larger, strict=True):
            assert side <= padded_side <= limit
            assert padded_side <= max(side + 3, side * 5 / 4)
        assert padded_grid(*larger, limit) == larger
    assert sorted(set(padded.values())) == grids(limit)


def test_published_grids():
    """A server compiles other grids beforehand than its images then have, or more than it says."""
    assert len(grids(64)) == 144
    assert {rows for rows, _ in grids(64)} == {4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64}
    edits = set()
    for width in SIDES:
        for height in SIDES:
            size = resized_size(*resized_size(width, height, RESIZE), RESIZE)
            edits.add(padded_grid(size[1] // 16, size[0] // 16, 64))
    assert sorted(edits) == grids(64, 32)
    assert len(edits) == 39


@pytest.mark.parametrize("grid", [(0, 4), (4, 0), (-1, 4), (65, 4), (4, 65), (4.0, 4)])
def test_bad_grids(grid):
    """An image without pixels, or one that the model has no positions for."""
    with pytest.raises(InputError, match="must be a whole number, from 1 to 64"):
        padded_grid(*grid, 64)
