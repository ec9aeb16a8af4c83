"""A model taken apart into what is static and what is an array, and put together from arrays by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from bagel_jax.config import BagelConfig
from bagel_jax.models.bagel import BagelModel
from bagel_jax.models.layers import stack, unrolled

_LAYERS = "trunk", "layers"
_CACHE = 2**26  # bytes, of a large processor's


class Skeleton:
    """Everything of a model but its arrays, as a static argument of programs.

    Equal models have the very same one, so that it compares and hashes by identity: a `GraphDef` of a 7B model takes
    25 ms to hash, in every call.
    """

    _known: ClassVar[dict[Any, Skeleton]] = {}

    def __init__(self, graph: nnx.GraphDef, tree: jax.tree_util.PyTreeDef):
        self._graph, self._tree = graph, tree

    @classmethod
    def of(cls, graph: nnx.GraphDef, params: nnx.State) -> Skeleton:
        """The one of a model taken apart."""
        tree = jax.tree.structure(params)
        return cls._known.setdefault((graph, tree), cls(graph, tree))

    def merge(self, arrays: Sequence[jax.Array]) -> BagelModel:
        """The module with its arrays in it."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, arrays))


@dataclass(frozen=True)
class Weights:
    """A model taken apart for `jax.jit`: the static graph and the pytree of parameters (`nnx.split`)."""

    graph: nnx.GraphDef
    params: nnx.State

    @functools.cached_property
    def skeleton(self) -> Skeleton:
        """What programs take as static."""
        return Skeleton.of(self.graph, self.params)

    @functools.cached_property
    def arrays(self) -> tuple[jax.Array, ...]:
        """What programs take beside `skeleton`: a flat tuple, since a call with a tree of modules takes longer."""
        return tuple(jax.tree.leaves(self.params))

    @property
    def device(self) -> jax.Device:
        """The device where the parameters are, one of them if there are several."""
        return next(iter(self.arrays[0].devices()))

    def on(self, sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding]) -> Weights:
        """The same weights elsewhere: `sharding` says where a parameter of a path and shape goes."""
        moved = {path: _moved(x, sharding(path, x.shape)) for path, x in flatten(self.params).items()}
        return fill(self, moved)

    @property
    def better_unrolled(self) -> bool:
        """Whether the trunk's layers are faster apart.

        Programs on a GPU and a CPU read their weights through libraries, for which a layer's slice of stacked ones is
        copied out in every step: each weight is then read twice and written once. On a CPU that does not matter where
        all fit in its cache, and it compiles faster.
        """
        platform = self.device.platform
        size = sum(v.get_value().nbytes for path, v in nnx.to_flat_state(self.params) if path[:2] == _LAYERS)
        return platform == "gpu" or (platform == "cpu" and size > _CACHE)

    def for_serving(self, config: BagelConfig, dtype) -> Weights:
        """These, or where that is faster the same with the trunk's layers apart, which frees the arrays here."""
        if not self.better_unrolled:
            return self
        unstack = _viewed if self.device.platform == "cpu" else _unstack
        apart = []
        for path, variable in nnx.to_flat_state(self.params):
            if path[:2] != _LAYERS:
                apart.append((path, variable))
                continue
            array = variable.get_value()
            apart += [((*_LAYERS, i, *path[2:]), variable.replace(x)) for i, x in enumerate(unstack(array))]
            array.delete()
        return Weights(abstract_weights(config, dtype, unrolled).graph, nnx.from_flat_state(apart))

    def model(self) -> BagelModel:
        """The module again."""
        return nnx.merge(self.graph, self.params)


@functools.cache
def weight_bytes(config: BagelConfig, dtype) -> int:
    """Bytes of all parameters in a dtype."""
    leaves = jax.tree.leaves(abstract_weights(config, dtype).params)
    return sum(math.prod(leaf.shape) for leaf in leaves) * np.dtype(dtype).itemsize


def abstract_weights(config: BagelConfig, dtype, trunk_layers=stack) -> Weights:
    """The model with `jax.ShapeDtypeStruct` in place of every parameter; nothing is allocated."""
    return Weights(*nnx.split(nnx.eval_shape(lambda: BagelModel(config, dtype, nnx.Rngs(0), trunk_layers))))


def _moved(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # `device_put` would ask the other processes whether they have the same.
    return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)


def _unstack(x: jax.Array) -> list[jax.Array]:
    """A parameter's layers, each laid out as all of them were."""
    return jax.jit(_sliced, out_shardings=_of_layer(x.sharding))(x)


def _sliced(x):
    return [x[i] for i in range(x.shape[0])]


def _viewed(x: jax.Array) -> list[jax.Array]:
    """`_unstack` without compiling for each shape, and without a copy: a layer is a view of the array's own memory.

    Which stays until the last view is gone, also when the array is deleted. (A layer that does not begin at a multiple
    of 64 bytes is copied.)
    """
    sharding = _of_layer(x.sharding)
    parts = [(shard.device, np.asarray(shard.data)) for shard in x.addressable_shards]
    layers = [[jax.device_put(part[i], device) for device, part in parts] for i in range(x.shape[0])]
    return [jax.make_array_from_single_device_arrays(x.shape[1:], sharding, layer) for layer in layers]


def _of_layer(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Where a layer lies if all of them, on a leading axis that is never cut, lie there."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def flatten(params: nnx.State) -> dict[str, object]:
    """Parameters by dotted path."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(params)}


def fill(weights: Weights, arrays: dict[str, jax.Array]) -> Weights:
    """`weights` with each parameter replaced by the array of its dotted path."""
    flat = [
        (path, variable.replace(arrays[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(weights.params)
    ]
    return Weights(weights.graph, nnx.from_flat_state(flat))
