"""The one exception for what a person gave and can put right, and the checks that raise it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class InputError(ValueError):
    """Bad input: one sentence that names the thing, its value and what would be right.

    The command line prints it and exits with code 2.
    """


def check_whole(name: str, value, low: int, high: float = math.inf) -> None:
    """Raises `InputError` unless `value` is a whole number in the range."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise InputError(f"{name} is {value!r}; it must be a whole number, {span}")


def check_number(name: str, value, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Raises `InputError` unless `value` is a finite number in the range (`above`: `low` itself is outside)."""
    good = isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or value > high or (above and value == low):
        span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        if above:
            span = f"above {low}" if high == math.inf else f"above {low} and at most {high}"
        raise InputError(f"{name} is {value!r}; it must be a number, {span}")


def check_flag(name: str, value) -> None:
    """Raises `InputError` unless `value` is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be true or false")


def check_choice(name: str, value, choices: Sequence[str]) -> None:
    """Raises `InputError` unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")
