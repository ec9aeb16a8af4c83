"""The mesh of devices, and single ones by their numbers."""

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


def stage_devices(ar_device: int, dit_device: int) -> tuple[jax.Device, jax.Device]:
    """The devices of stage 0 and stage 1, by their numbers among this process's.

    Raises:
        InputError: there is no such device.
    """
    devices = jax.local_devices()
    for name, number in (("ar_device", ar_device), ("dit_device", dit_device)):
        if number >= len(devices):
            raise InputError(f"{name} is {number}; it must be a device's number, from 0 to {len(devices) - 1}")
    return devices[ar_device], devices[dit_device]
