"""Logical axes of parameters, and rules that lay them along the mesh.

A parameter's axes have names of what they count; the rules say which mesh axis cuts which name. So another way of
sharding is another set of rules, and no network changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
    (r"vit\.layers\.fc2\.kernel", ("mlp", "embed")),
    (r"vit\.layers\..*\.kernel", ("embed", None)),
    (r"(connector|time_embed)\..*\.kernel", (None, "embed")),
    (r"latent_in\.kernel", (None, "embed")),
    (r"latent_out\.kernel", ("embed", None)),
)

Rules = Mapping[str, str | None]

# Fully sharded data parallelism: each parameter is cut along the model width.
FSDP: Rules = {"embed": "fsdp", "heads": None, "mlp": None, "vocab": None}
# A stage of the engine: what is computed side by side is cut, the model width never.
SERVING: Rules = {"embed": None, "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}


def partition(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = FSDP) -> PartitionSpec:
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
    spec: list[str | None] = [None] * (len(shape) - len(names))
    for size, name in zip(shape[len(spec) :], names, strict=True):
        axis = rules.get(name) if name is not None else None
        spec.append(axis if axis is not None and size % mesh.shape[axis] == 0 else None)
    used = [axis for axis in spec if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"the rules put two axes of {path} along mesh axis {used[0]!r}")
    return PartitionSpec(*spec)


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
