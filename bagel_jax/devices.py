"""What a user says of meshes and devices. No jax here: bad options are found without it."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from bagel_jax.errors import InputError


class MeshShape(NamedTuple):
    """How many devices along each axis of a stage's mesh."""

    data: int = 1  # requests and guidance rows
    sequence: int = 1  # latent tokens of one image
    tensor: int = 1  # heads, MLP, vocabulary

    @classmethod
    def parse(cls, name: str, text: str) -> MeshShape:
        """The shape that `text` says: `data=2,tensor=4`; axes that are not named have one device.

        Raises:
            InputError: it says something else; `name` is what the value is called.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = (x.strip() for x in part.partition("="))
            if axis not in cls._fields or axis in sizes or not re.fullmatch(r"0*[1-9][0-9]{0,3}", size, re.ASCII):
                raise InputError(
                    f"{name} is {text!r}; it must say how many devices lie along axes, each once, as data=2,tensor=4 "
                    f"(the axes are {', '.join(cls._fields)})"
                )
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self)

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis, size in self._asdict().items() if size > 1]
        return ",".join(named) or "one device"


def device_numbers(name: str, text: str) -> tuple[int, ...]:
    """The numbers of devices that `text` says: `0-3`, `0,2,5`, `0-1,4-5`.

    Raises:
        InputError: it says something else, or a device twice; `name` is what the value is called.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?\s*", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise InputError(f"{name} is {text!r}; it must be numbers of devices, as 0-3 or 0,2,5")
        numbers += range(first, last + 1)
    if len(set(numbers)) < len(numbers):
        raise InputError(f"{name} is {text!r}, which names a device twice; name each once")
    return tuple(numbers)
