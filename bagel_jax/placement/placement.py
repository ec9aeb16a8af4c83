"""Where a stage's arrays lie: a mesh of devices and the rules that lay parameters along it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from bagel_jax.config import BagelConfig
from bagel_jax.devices import MeshShape
from bagel_jax.errors import InputError
from bagel_jax.models.weights import weight_bytes
from bagel_jax.placement.rules import SERVING, Rules, partition
from bagel_jax.placement.spread import AXES, DATA, HEADS, PAGES, SEQUENCE, SPARE, Spread
from bagel_jax.settings import EngineConfig


@dataclass(frozen=True, eq=False)
class Placement:
    """The devices of a stage. Two stages with the very same one share one store of keys and values.

    Args:
        mesh: devices along `AXES`.
        rules: which axis of a parameter lies along which of the mesh.
    """

    mesh: Mesh
    rules: Rules = field(default_factory=lambda: SERVING)

    @classmethod
    def on(cls, device: jax.Device) -> Placement:
        """All on one device."""
        return cls.over([device], 1)

    @classmethod
    def over(
        cls, devices: Sequence[jax.Device], kv_heads: int, data: int = 1, sequence: int = 1, tensor: int = 1
    ) -> Placement:
        """A mesh of as many devices.

        Args:
            devices: `data sequence tensor` of them.
            kv_heads: K. As many devices along `tensor` as divide it share out the heads; the rest of them share out
                queries, and the MLP and the vocabulary as all others do.
            data, sequence, tensor: devices along the axes.
        """
        heads = math.gcd(tensor, kv_heads)
        shape = data, sequence, heads, tensor // heads
        return cls(Mesh(_in_order(devices, shape), AXES))

    @property
    def device(self) -> jax.Device:
        """The first device of this process."""
        return _first_here(self.mesh.devices.flat)

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`: what programs are compiled for."""
        return self.device.platform

    @property
    def shape(self) -> MeshShape:
        """How many devices lie along the axes that a user names."""
        sizes = self.mesh.shape
        return MeshShape(sizes[DATA], sizes[SEQUENCE], sizes[HEADS] * sizes[SPARE])

    @property
    def several_processes(self) -> bool:
        """Whether some of the devices are another process's."""
        return any(device.process_index != jax.process_index() for device in self.mesh.devices.flat)

    @property
    def spread(self) -> Spread:
        """What programs must know of the mesh."""
        return Spread(self.mesh if self.mesh.size > 1 else None)

    def parameter(self, path: str, shape: tuple[int, ...]) -> Sharding:
        """Where a parameter of a path and shape lies."""
        return self.sharding(*partition(path, shape, self.mesh, self.rules))

    def pages(self) -> Sharding:
        """Where pages of keys and values lie."""
        return self.sharding(*PAGES)

    def sharding(self, *spec: Any) -> Sharding:
        """An array whose axes are cut by axes of the mesh; nothing: whole on every device."""
        # One way of saying "on this device", or a program would be compiled for each way.
        if self.mesh.size == 1:
            return SingleDeviceSharding(self.device)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def put(self, tree: Any, *spec: Any) -> Any:
        """A pytree's arrays put here, for good, as `sharding` says.

        What a program returns is bound to its devices; what the host makes is not. A program that gets now one, now the
        other for the same argument is compiled twice.
        """
        sharding = self.sharding(*spec)
        if sharding.is_fully_addressable:
            return jax.device_put(tree, sharding)
        # `device_put` would first ask the other processes whether they have the same.
        return jax.tree.map(lambda x: _global(np.asarray(x), sharding), tree)

    def share_of_page(self) -> int:
        """Into how many parts a page of keys and values is cut."""
        return self.mesh.shape[HEADS]

    def memory(self) -> int | None:
        """Bytes that are free on a device; None on a CPU, whose devices have none of their own."""
        stats = self.device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None

    def free_bytes(self, share: float) -> int:
        """A share of the free memory of a device, the same in all processes; on a CPU its part of a quarter of it."""
        free = self.memory()
        free = machine_memory() // 4 // self.mesh.size if free is None else int(share * free)
        if not self.several_processes:
            return free
        return int(multihost_utils.process_allgather(np.float64(free)).min())


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _first_here(devices: Iterable[jax.Device]) -> jax.Device:
    """The first of the devices that this process has; of others nothing can be asked."""
    here = jax.process_index()
    return next(device for device in devices if device.process_index == here)


def _in_order(devices: Sequence[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """Devices as an array in which neighbours are near each other, as far as that is known."""
    if devices[0].platform == "tpu":
        try:
            return mesh_utils.create_device_mesh(shape, devices)
        except (ValueError, NotImplementedError, AssertionError):  # some devices of a slice, or an odd shape
            pass
    return np.asarray(devices).reshape(shape)


def _global(x: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def stage_placements(settings: EngineConfig, config: BagelConfig, dtype) -> tuple[Placement, Placement]:
    """The placements of the two stages.

    Stages with the same devices and mesh have the same placement. One device of a CPU is the exception, unless the
    stages work by turns: it runs programs of both at the same time, for a third more requests a second on two cores,
    but only where they share no array that one of them writes.

    Args:
        settings: see `EngineConfig`.
        config, dtype: of the model, by whose size a mesh is chosen where none is asked for.

    Raises:
        InputError: there are no such devices, or not as many as a mesh has.
    """
    chosen = [_chosen(settings, stage, partial(weight_bytes, config, dtype)) for stage in ("ar", "dit")]
    _check_processes(chosen)
    context, denoise = (Placement.over(devices, config.trunk.num_kv_heads, *shape) for devices, shape in chosen)
    if chosen[0] != chosen[1]:
        return context, denoise
    overlap = context.mesh.size == 1 and context.platform == "cpu" and settings.topology == "two-stage"
    return context, denoise if overlap else context


def _check_processes(chosen: Sequence[tuple[list[jax.Device], MeshShape]]) -> None:
    """That every process has a part in every program, which is how JAX runs programs on several hosts."""
    processes = {device.process_index for devices, _ in chosen for device in devices}
    if len(processes) == 1:
        return
    if chosen[0] != chosen[1]:
        raise InputError(
            f"the stages have meshes {chosen[0][1]} and {chosen[1][1]} of devices of {len(processes)} processes; over "
            "several processes both must have the same mesh of the same devices"
        )
    if len(processes) < jax.process_count():
        raise InputError(
            f"the mesh {chosen[0][1]} has devices of {len(processes)} processes, but there are {jax.process_count()}; "
            "each must have one, so give a larger mesh or start fewer processes"
        )


def _chosen(
    settings: EngineConfig, stage: str, size_of_weights: Callable[[], int]
) -> tuple[list[jax.Device], MeshShape]:
    """The devices of a stage, and its mesh of them."""
    numbers, shape, first = settings.stage_devices(stage), settings.stage_mesh(stage), settings.stage_device(stage)
    found = jax.devices()
    if numbers is None:
        if first is not None or shape is not None:
            size = 1 if shape is None else shape.size
            numbers = tuple(range(first or 0, (first or 0) + size))
        else:  # nothing is said
            alone = found[0].platform == "cpu" and jax.process_count() == 1
            numbers = (0,) if alone else tuple(range(len(found)))
    if max(numbers) >= len(found):
        asked = f"{stage}_device is {first}" if len(numbers) == 1 else f"{stage} needs devices up to {max(numbers)}"
        raise InputError(f"{asked}; it must be a device's number, from 0 to {len(found) - 1}")
    devices = [found[number] for number in numbers]
    shape = shape or best_mesh(devices, size_of_weights)
    if shape.size != len(devices):
        raise InputError(
            f"the mesh of {stage} is {shape}, which is {shape.size} devices, but {stage}_devices names {len(devices)}; "
            "the numbers must be the same"
        )
    return devices, shape


def best_mesh(devices: Sequence[jax.Device], size_of_weights: Callable[[], int]) -> MeshShape:
    """The mesh for some devices where none is asked for: as few along `tensor` as the model needs, the rest `data`.

    Guidance rows on devices of their own exchange nothing but keys and values, so that is what is best for images; what
    is left beside the weights should hold the KV cache and what programs need.
    """
    count = len(devices)
    limit = (_first_here(devices).memory_stats() or {}).get("bytes_limit")
    if count == 1 or limit is None:
        return MeshShape(data=count)
    return mesh_within(limit, count, size_of_weights())


def mesh_within(limit: int, count: int, weights: int) -> MeshShape:
    """`best_mesh` of `count` devices with so many bytes of memory each, for weights of so many."""
    fits = [n for n in range(1, count + 1) if count % n == 0 and weights / n <= 0.6 * limit]
    tensor = fits[0] if fits else count
    return MeshShape(data=count // tensor, tensor=tensor)
