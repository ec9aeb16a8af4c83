"""Sizes that programs are compiled for: what varies is padded to one of few."""

from __future__ import annotations


def bucket(length: int, least: int = 16) -> int:
    """`length` padded to one of few: at most an eighth more, and at least `least`."""
    unit = max(least, 2 ** max(0, length.bit_length() - 4))
    return max(least, -(-length // unit) * unit)


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is not less than `count` and `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())
