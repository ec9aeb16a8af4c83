"""Logical axes of parameters, and rules that lay them along the mesh.

A parameter's axes have names of what they count; the rules say which mesh axis cuts which name. So another way of
sharding is another set of rules, and no network changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from bagel_jax.placement.spread import HEADS, TENSOR

# First match by path; axes from the last one backwards, so that a leading layer axis needs no mention.
_LOGICAL: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"trunk\.embed\.embedding", ("vocab", "embed")),
    (r"trunk\.lm_head\.kernel", ("embed", "vocab")),
    # A head's numbers are never cut: rotary embedding pairs them, and attention sums over them.
    (r"trunk\.layers\..*\.(q|k|v)\.kernel", ("embed", "heads", None)),
    (r"trunk\.layers\..*\.(q|k|v)\.bias", ("heads", None)),
    (r"trunk\.layers\..*\.o\.kernel", ("heads", None, "embed")),
    (r"trunk\.layers\..*\.(gate|up)\.kernel", ("embed", "mlp")),
    (r"trunk\.layers\..*\.down\.kernel", ("mlp", "embed")),
    (r"trunk\.layers\..*\.o\.kernel\.lora_a", ("heads", None, None)),
    (r"trunk\.layers\..*\.(q|k|v)\.kernel\.lora_b", (None, "heads", None)),
    (r"trunk\.layers\..*\.lora_a", ("embed", None)),
    (r"trunk\.layers\..*\.lora_b", (None, "embed")),
    (r"vit\.layers\.fc1\.kernel", ("embed", "mlp")),
    (r"vit\.layers\.fc1\.bias", ("mlp",)),
    (r"vit\.layers\.fc2\.kernel", ("mlp", "embed")),
    (r"vit\.layers\..*\.kernel", ("embed", None)),
    (r"(connector|time_embed)\..*\.kernel", (None, "embed")),
    (r"latent_in\.kernel", (None, "embed")),
    (r"latent_out\.kernel", ("embed", None)),
)

# Mesh axes by logical axis; where several do not cut it evenly, fewer of them may, the last ones left out.
Rules = Mapping[str, str | tuple[str, ...] | None]

# Fully sharded data parallelism: each parameter is cut along the model width.
FSDP: Rules = {"embed": "fsdp", "heads": None, "mlp": None, "vocab": None}
# A stage of the engine: what is computed side by side is cut, the model width never.
SERVING: Rules = {"embed": None, "heads": HEADS, "mlp": TENSOR, "vocab": TENSOR}


def partition(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules = FSDP) -> PartitionSpec:
    """Which mesh axis each axis of a parameter lies along. An axis that does not divide evenly is not cut.

    Args:
        path: the parameter's dotted path.
        shape: its shape.
        mesh: the devices.
        rules: mesh axis by logical axis.

    Raises:
        ValueError: the rules put two axes of a parameter along one mesh axis.
    """
    names = next((axes for pattern, axes in _LOGICAL if re.fullmatch(pattern, path)), ())
    spec: list[str | tuple[str, ...] | None] = [None] * (len(shape) - len(names))
    for size, name in zip(shape[len(spec) :], names, strict=True):
        spec.append(_even(size, rules.get(name) if name is not None else None, mesh))
    used = [axis for axes in spec if axes is not None for axis in ((axes,) if isinstance(axes, str) else axes)]
    if len(used) != len(set(used)):
        raise ValueError(f"the rules put two axes of {path} along mesh axis {used[0]!r}")
    return PartitionSpec(*spec)


def _even(size: int, axes: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> str | tuple[str, ...] | None:
    """Those of the axes that cut `size` evenly."""
    if axes is None or isinstance(axes, str):
        return axes if axes is not None and size % mesh.shape[axes] == 0 else None
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes or None


def cut_size(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules = FSDP) -> int:
    """How many numbers of a parameter a device of a mesh has, whether its devices are here or not."""
    spec = [(axes,) if isinstance(axes, str) else axes for axes in partition(path, shape, mesh, rules) if axes]
    return math.prod(shape) // math.prod(mesh.shape[axis] for axes in spec for axis in axes)


def sharding(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = FSDP) -> NamedSharding:
    """`partition` on the mesh."""
    return NamedSharding(mesh, partition(path, shape, mesh, rules))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """Batches: the second axis (rows, after the axis of accumulation) is cut over all devices."""
    return NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))


def by_rows(mesh: Mesh, x: jax.Array) -> jax.Array:
    """Says inside a jitted function that `x` `[B, ...]` is cut by rows, so that weights are gathered and not `x`."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
