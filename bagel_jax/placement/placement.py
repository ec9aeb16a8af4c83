"""Where a stage's arrays lie: a mesh of devices and the rules that lay parameters along it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from bagel_jax.errors import InputError
from bagel_jax.placement.rules import SERVING, Rules, partition

AXES = ("data", "sequence", "tensor")


@dataclass(frozen=True, eq=False)
class Placement:
    """The devices of a stage. Two stages with the very same one share one store of keys and values.

    Args:
        mesh: devices along `AXES`; for now there is one.
        rules: which axis of a parameter lies along which of the mesh.
    """

    mesh: Mesh
    rules: Rules = field(default_factory=lambda: SERVING)

    @classmethod
    def on(cls, device: jax.Device) -> Placement:
        """All on one device."""
        return cls(Mesh(np.asarray([device]).reshape(1, 1, 1), AXES))

    @property
    def device(self) -> jax.Device:
        """The first device."""
        return self.mesh.devices.flat[0]

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`: what programs are compiled for."""
        return self.device.platform

    def parameter(self, path: str, shape: tuple[int, ...]) -> Sharding:
        """Where a parameter of a path and shape lies."""
        return self._sharding(partition(path, shape, self.mesh, self.rules))

    def pages(self) -> Sharding:
        """Where pages of keys and values lie, and all else that programs keep."""
        return self._sharding(PartitionSpec())

    def _sharding(self, spec: PartitionSpec) -> Sharding:
        # One way of saying "on this device", or a program would be compiled for each way.
        return SingleDeviceSharding(self.device) if self.mesh.size == 1 else NamedSharding(self.mesh, spec)

    def put(self, tree: Any) -> Any:
        """A pytree's arrays put here, for good.

        What a program returns is bound to its devices; what the host makes is not. A program that gets now one, now the
        other for the same argument is compiled twice.
        """
        return jax.device_put(tree, self.pages())

    def free_bytes(self, share: float) -> int:
        """A share of the free memory of a device; on a CPU a quarter of the machine's."""
        stats = self.device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(share * (stats["bytes_limit"] - stats["bytes_in_use"]))
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def stage_placements(
    context_device: int, denoise_device: int, *, by_turns: bool = False
) -> tuple[Placement, Placement]:
    """The placements of the two stages, by the numbers of their devices among this process's.

    Stages on one device have the same one. A CPU is the exception, unless the stages work `by_turns`: it runs programs
    of both at the same time, for a third more requests a second on two cores, but only where they share no array that
    one of them writes.

    Raises:
        InputError: there is no such device.
    """
    devices = jax.local_devices()
    for name, number in (("ar_device", context_device), ("dit_device", denoise_device)):
        if number >= len(devices):
            raise InputError(f"{name} is {number}; it must be a device's number, from 0 to {len(devices) - 1}")
    context = Placement.on(devices[context_device])
    if devices[context_device] == devices[denoise_device] and (by_turns or context.platform != "cpu"):
        return context, context
    return context, Placement.on(devices[denoise_device])
