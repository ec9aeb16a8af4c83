"""The mesh of devices that training runs on."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from bagel_jax.errors import InputError

AXES = ("data", "fsdp")


def make_mesh(data: int = 1, fsdp: int = 0) -> Mesh:
    """All devices as `data` copies of the model, each cut into `fsdp` parts.

    Args:
        data: number of copies; 0: as many as there is room for.
        fsdp: number of parts; 0: likewise, after `data`.

    Raises:
        InputError: the two do not use up the devices there are.
    """
    count = jax.device_count()
    if data == 0:
        data = count // max(fsdp, 1)
    if fsdp == 0:
        fsdp = count // max(data, 1)
    if data * fsdp != count:
        raise InputError(
            f"the mesh is data {data} x fsdp {fsdp}, but there are {count} devices; the product must be that"
        )
    return Mesh(np.asarray(jax.devices()).reshape(data, fsdp), AXES)
