"""How the arrays of a program lie over the devices of a stage. On one device nothing of this is in the program.

Matrix products, norms and convolutions are left to XLA, which follows the parameters (`rules.py`) and what `Spread`
says of activations. Kernels cannot be cut by XLA: they run in `Spread.each`, each device on its own KV heads, its own
rows and its own queries, over all keys of a row. So what moves for attention are the keys and values of the tokens of
the step, `2 K E` numbers a token, and only between devices that cut tokens. Merging partial results by their
log-sum-exp instead would move queries and results, `2 H E`, which is never less.

Pages lie on all devices that have the same KV heads. Stage 1's blocks are written where their rows are and nowhere
else: nobody reads them after the step, so what the others have there does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Axes of a mesh. What a user calls `tensor` is `heads` times `spare`: as many devices as share out the KV heads evenly,
# and for each of them so many more, among which attention is cut by queries, since a head never is.
DATA, SEQUENCE, HEADS, SPARE = AXES = ("data", "sequence", "heads", "spare")
TENSOR = (HEADS, SPARE)
QUERIES = (DATA, SEQUENCE, SPARE)  # what may cut queries in attention
IMAGE_ROWS = AXES  # what cuts an image's rows in the autoencoder
PAGES = PartitionSpec(None, None, HEADS, None, None, None)

Spec = PartitionSpec


@dataclass(frozen=True)
class Spread:
    """The mesh of a stage, as a static argument of programs; None: one device."""

    mesh: Mesh | None = None

    def parts(self, axes: str | tuple[str, ...]) -> int:
        """Into how many parts some axes of the mesh cut."""
        names = (axes,) if isinstance(axes, str) else axes
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in names)

    def padded(self, count: int, axes: str | tuple[str, ...]) -> int:
        """The smallest number, not below `count`, that they cut evenly."""
        parts = self.parts(axes)
        return -(-count // parts) * parts

    def even(self, count: int, axes: str | tuple[str, ...]) -> str | tuple[str, ...] | None:
        """The axes, if they cut `count` evenly; None, for whole on every device, if they do not."""
        return axes if count % self.parts(axes) == 0 else None

    def lay(self, tree: Any, *spec: Any) -> Any:
        """Says how arrays lie: which axes of the mesh cut which of theirs; those that cut unevenly do not."""
        return tree if self.mesh is None else jax.tree.map(lambda x: self._laid(x, spec), tree)

    def each(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` on each device's own part of its arguments, cut as `in_specs` say (see `jax.shard_map`)."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def number(self, axes: tuple[str, ...]) -> Any:
        """Inside `each`: which of the parts this device has."""
        return 0 if self.mesh is None else jax.lax.axis_index(axes)

    def _laid(self, x: jax.Array, spec: tuple) -> jax.Array:
        even = [axes and self.even(size, axes) for axes, size in zip(spec, x.shape, strict=False)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*even)))


ONE_DEVICE = Spread()
