"""From a checkpoint's files to a model, one parameter at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.checkpoint.assemble import assemble
from bagel_jax.checkpoint.files import NUMPY, CheckpointFiles, TensorInfo
from bagel_jax.checkpoint.table import AUTOENCODER, COMPONENTS, MAIN, Target, resolve
from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.models.weights import Weights, abstract_weights, fill, flatten

ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def on_default_device(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Every parameter whole on the first device."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def on_device(device: jax.Device) -> ShardingOf:
    """Every parameter whole on one device; it goes there from the host and over no other."""
    placed = jax.sharding.SingleDeviceSharding(device)
    return lambda path, shape: placed


def targets_of(config: BagelConfig) -> list[Target]:
    """Every parameter of a model of these sizes, and what fills it."""
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_weights(config, jnp.float32).params).items()}
    return resolve(shapes)


@dataclass
class Report:
    """How a checkpoint's tensors fit a model."""

    tensors: dict[str, list[TensorInfo]] = field(default_factory=lambda: {name: [] for name in COMPONENTS})
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """One line a tensor that does not fit."""
        return (
            [f"tensor {name} is missing" for name in self.missing]
            + [f"tensor {name} is unexpected" for name in self.unexpected]
            + self.wrong_shape
        )


class PublishedCheckpoint:
    """A checkpoint in the published layout, its tensors matched to the model they fill.

    Args:
        files: the open files.
        config: the sizes, from `read_config`.
    """

    def __init__(self, files: CheckpointFiles, config: BagelConfig):
        self.files, self.config = files, config
        self.targets = targets_of(config)

    def report(self) -> Report:
        """Missing, unexpected and wrong-shaped tensors, and what each component holds."""
        report = Report()
        expected = set()
        for target in self.targets:
            kind = target.row.file
            for name in target.sources:
                expected.add((kind, name))
                info = self.files.tensors[kind].get(name)
                if info is None:
                    report.missing.append(name)
                    continue
                report.tensors[target.row.component].append(info)
                if info.shape != target.source_shape:
                    report.wrong_shape.append(
                        f"tensor {name} has shape {list(info.shape)}; the model needs {list(target.source_shape)}"
                    )
                elif info.dtype not in NUMPY:
                    report.wrong_shape.append(
                        f"tensor {name} has dtype {info.dtype}; only {', '.join(NUMPY)} can be read"
                    )
        report.unexpected = [
            name for kind in (MAIN, AUTOENCODER) for name in self.files.tensors[kind] if (kind, name) not in expected
        ]
        return report

    def check(self) -> None:
        """Raises `InputError`, naming the tensors, unless every tensor fits."""
        problems = self.report().problems
        if problems:
            shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
            raise InputError(f"the checkpoint in {self.files.directory} does not fit its model: {shown}")

    def stored_dtype(self, target: Target) -> np.dtype:
        """The dtype that a parameter's tensors have in the files; the widest, where layers differ."""
        infos = (self.files.tensors[target.row.file][name] for name in target.sources)
        return functools.reduce(jnp.promote_types, {NUMPY[info.dtype] for info in infos})

    def read(self, target: Target, dtype, sharding: jax.sharding.Sharding) -> jax.Array:
        """One parameter as an array of `dtype`; of each tensor only the parts are read that devices keep, each once.

        Raises:
            ValueError: the sharding cuts inside a head.
        """
        stacked = target.row.stacked
        kind = np.dtype(dtype)

        def part(read, index: tuple[slice, ...]) -> np.ndarray:
            source_index = target.source_index(index[stacked:])
            out = np.empty([s.stop - s.start for s in index], kind)
            places = out if stacked else out[None]
            layers = range(len(target.sources))[index[0]] if stacked else range(1)
            for place, layer in zip(places, layers, strict=True):
                place[...] = target.to_target(read(target.row.file, target.sources[layer], source_index))
            return out

        with self.files.reading() as read:
            return assemble(target.shape, kind, sharding, partial(part, read), stacked=stacked)

    def load(
        self, dtype, progress: Callable[[int, int], None] | None = None, sharding: ShardingOf = on_default_device
    ) -> Weights:
        """All weights in `dtype`.

        Args:
            dtype: jax dtype of every parameter.
            progress: called as `progress(parameters done, of how many)`.
            sharding: where a parameter of a path and shape goes.
        """
        arrays = {}
        if progress is not None:
            progress(0, len(self.targets))
        for target in self.targets:
            arrays[target.path] = self.read(target, jnp.dtype(dtype), sharding(target.path, target.shape))
            if progress is not None:
                progress(len(arrays), len(self.targets))
        return fill(abstract_weights(self.config, dtype), arrays)
