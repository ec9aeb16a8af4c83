"""Sizes that programs are compiled for: what varies is padded to one of few."""

from __future__ import annotations

from bagel_jax.errors import check_whole


def bucket(length: int, least: int = 16) -> int:
    """`length` padded to one of few: at most an eighth more, and at least `least`."""
    unit = max(least, 2 ** max(0, length.bit_length() - 4))
    return max(least, -(-length // unit) * unit)


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is not less than `count` and `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())


def padded_grid(rows: int, columns: int, limit: int) -> tuple[int, int]:
    """The grid of latent tokens that a grid is padded to, on the right and below, where the autoencoder works on it.

    A side becomes one of four an octave, so it grows by a quarter at most; a short one becomes a multiple of 4.

    Args:
        rows, columns: of the image, in latent tokens.
        limit: the longest side that the model has (64 in the published one); no side becomes longer.

    Raises:
        InputError: a side is none, or longer than the limit.
    """
    for name, side in (("rows", rows), ("columns", columns)):
        check_whole(name, side, 1, limit)
    return _padded_side(rows, limit), _padded_side(columns, limit)


def grids(limit: int, least: int = 1) -> list[tuple[int, int]]:
    """All that `padded_grid` returns for images of a model; what is compiled for each of them is all there is.

    The published model has 144 (limit 64: sides of 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56 and 64), which text2img may
    ask for: any multiple of 16 pixels up to 1024. Input images, and so edits, meet 39 of them (`least` 32): their
    resize, to 512 to 1024 pixels a side, leaves a side shorter only where the other one is at the limit.

    Args:
        limit: the longest side that the model has, in latent tokens.
        least: leaves out grids with a shorter side than this whose other side is below the limit.
    """
    sides = sorted({_padded_side(side, limit) for side in range(1, limit + 1)})
    pairs = [(rows, columns) for rows in sides for columns in sides]
    return [pair for pair in pairs if min(pair) >= least or max(pair) == limit]


def _padded_side(length: int, limit: int) -> int:
    unit = max(4, 2 ** max(0, length.bit_length() - 3))
    return min(limit, -(-length // unit) * unit)
