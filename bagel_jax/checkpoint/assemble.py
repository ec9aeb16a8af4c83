"""A parameter put together on its devices, a piece at a time.

Files know nothing of devices, and devices nothing of files: in between is one function that reads an index of a
parameter. Here it is called once for each part that some device of this host keeps, in pieces that bound what the host
holds, whatever the parameter's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Bytes of a parameter that the host holds at a time, unless it has no layers or one layer alone has more. The trunk's
# MLPs, 3.8 GB each in the published model, are read in 14 pieces.
_PIECE_BYTES = 2**29

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]


def assemble(
    shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding, read: Read, *, stacked: bool
) -> jax.Array:
    """An array laid out by a sharding.

    Args:
        shape: of the whole.
        dtype: of the whole.
        sharding: where its parts lie.
        read: the values at an index, in `dtype`; each axis of the index has a start and a stop. It is called once for
            each part, however many devices keep it, and not for parts that other hosts keep.
        stacked: whether the first axis is one of layers, so that a large array may be read some layers at a time.
    """
    layers = _layers_at_a_time(shape, dtype) if stacked else None
    if layers is None or layers == shape[0] or sharding.shard_shape(shape)[0] != shape[0]:
        return _placed(shape, sharding, read)
    whole = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, np.dtype(dtype))
    lay = jax.jit(jax.lax.dynamic_update_slice_in_dim, static_argnums=3, donate_argnums=0, out_shardings=sharding)
    for first in range(0, shape[0], layers):
        piece = _placed((layers, *shape[1:]), sharding, lambda index, first=first: read(_moved(index, first)))
        # Waited for, or the host would read on and hold all pieces before the first one is on its device.
        whole = jax.block_until_ready(lay(whole, piece, np.int32(first), 0))
    return whole


def _placed(shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Read) -> jax.Array:
    """All of an array, a part at a time."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        whole = (index or ()) + (slice(None),) * (len(shape) - len(index or ()))
        key = tuple(s.indices(size)[:2] for s, size in zip(whole, shape, strict=True))
        devices.setdefault(key, []).append(device)
    parts = []
    for key, holders in devices.items():
        part = read(tuple(slice(start, stop) for start, stop in key))
        parts += jax.block_until_ready([jax.device_put(part, device) for device in holders])
        del part  # before the next one is read
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _layers_at_a_time(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many layers a piece has: all pieces have as many, so that one program lays them all."""
    a_layer = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    return max(n for n in range(1, shape[0] + 1) if shape[0] % n == 0 and (n == 1 or n * a_layer <= _PIECE_BYTES))


def _moved(index: Index, first: int) -> Index:
    return (slice(index[0].start + first, index[0].stop + first), *index[1:])
