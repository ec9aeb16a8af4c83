"""A model taken apart into what is static and what is an array, and put together from arrays by name."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import nnx

from bagel_jax.config import BagelConfig
from bagel_jax.models.bagel import BagelModel


@dataclass(frozen=True)
class Weights:
    """A model taken apart for `jax.jit`: the static graph and the pytree of parameters (`nnx.split`)."""

    graph: nnx.GraphDef
    params: nnx.State

    def place(self, tree):
        """A pytree's arrays put, for good, on the device where the parameters are.

        What a program returns is bound to a device; what the host makes is not. A program that gets now one, now the
        other for the same argument is compiled twice.
        """
        return jax.device_put(tree, jax.tree.leaves(self.params)[0].sharding)

    def model(self) -> BagelModel:
        """The module again."""
        return nnx.merge(self.graph, self.params)


def abstract_weights(config: BagelConfig, dtype) -> Weights:
    """The model with `jax.ShapeDtypeStruct` in place of every parameter; nothing is allocated."""
    return Weights(*nnx.split(nnx.eval_shape(lambda: BagelModel(config, dtype, nnx.Rngs(0)))))


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
