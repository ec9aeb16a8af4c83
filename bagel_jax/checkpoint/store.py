"""Converted checkpoints: Orbax arrays, with all that a model needs besides.

A converted checkpoint is a directory with `bagel_jax.json` (format, sizes, the dtype of every parameter, the bytes of
every file), one Orbax checkpoint a component in `weights/`, and the tokenizer and json files of its source. It is
written beside its place and renamed when whole, so an interrupted conversion leaves nothing that loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from bagel_jax.checkpoint.files import read_json
from bagel_jax.checkpoint.folder import copy_small_files, written
from bagel_jax.checkpoint.load import PublishedCheckpoint, ShardingOf, on_default_device
from bagel_jax.checkpoint.table import COMPONENTS, Target, resolve
from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.models.weights import Weights, abstract_weights, fill, flatten

MANIFEST = "bagel_jax.json"
# In format 1 heads and their width were one axis, as in the published layout.
_FORMAT, _JOINED = 2, 1
# Arrays are cut into pieces of at most this many bytes, so that a device can read its part of one.
_CHUNK_BYTES = 64 * 2**20


def convert(
    checkpoint: PublishedCheckpoint, destination: Path, dtype=None, progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes a published checkpoint in the converted form, a component at a time.

    While Orbax writes a component it holds up to three copies of it, so the peak is somewhat above one model.

    Args:
        checkpoint: the source.
        destination: a directory that is not there yet.
        dtype: of every parameter; None keeps what the source has.
        progress: called as `progress(parameters done, of how many)`.

    Raises:
        InputError: the destination is there already or cannot be made, or the source does not fit its model.
    """
    import orbax.checkpoint as ocp  # late: half a second, and most models are read in the published layout

    checkpoint.check()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    dtypes: dict[str, str] = {}
    done = 0
    with written(destination) as folder:
        (folder / "weights").mkdir()
        for component in COMPONENTS:
            arrays = {}
            for target in (t for t in checkpoint.targets if t.row.component == component):
                kind = checkpoint.stored_dtype(target) if dtype is None else jnp.dtype(dtype)
                arrays[target.path] = checkpoint.read(target, kind, sharding)
                dtypes[target.path] = jnp.dtype(kind).name
                done += 1
                if progress is not None:
                    progress(done, len(checkpoint.targets))
            args = ocp.args.PyTreeSave(
                arrays, save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), arrays)
            )
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save((folder / "weights" / _folder(component)).absolute(), args)
        copy_small_files(checkpoint.files.directory, folder)
        manifest = {
            "format": _FORMAT,
            "config": checkpoint.config.to_dict(),
            "dtypes": dtypes,
            "files": {
                file.relative_to(folder).as_posix(): file.stat().st_size
                for file in sorted((folder / "weights").rglob("*"))
                if file.is_file()
            },
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _folder(component: str) -> str:
    return component.replace(" ", "_")


class ConvertedCheckpoint:
    """A checkpoint that `convert` wrote.

    Raises:
        InputError: its manifest is damaged or of another format, or a file of weights is missing or cut short.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        manifest = read_json(directory / MANIFEST)
        self._format = manifest.get("format")
        if self._format not in (_JOINED, _FORMAT):
            raise InputError(
                f"{directory / MANIFEST} has format {self._format!r}; this version reads formats {_JOINED} and "
                f"{_FORMAT}"
            )
        try:
            self.config = BagelConfig.from_dict(manifest["config"])
            files = dict(manifest["files"])
            self.dtypes = {path: jnp.dtype(name) for path, name in manifest["dtypes"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{directory / MANIFEST} is damaged ({error!r}); convert again") from None
        for name, size in files.items():
            file = directory / name
            found = file.stat().st_size if file.is_file() else 0
            if found != size:
                raise InputError(f"{file} has {found:,} bytes; it must have {size:,}, so copy it or convert again")

    def load(
        self, dtype, progress: Callable[[int, int], None] | None = None, sharding: ShardingOf = on_default_device
    ) -> Weights:
        """All weights in `dtype`; see `PublishedCheckpoint.load`.

        Raises:
            InputError: the arrays do not fit the manifest's sizes.
        """
        weights = abstract_weights(self.config, dtype)
        leaves = flatten(weights.params)
        components = {t.path: t.row.component for t in resolve({p: leaf.shape for p, leaf in leaves.items()})}
        arrays: dict[str, jax.Array] = {}
        if progress is not None:
            progress(0, len(leaves))
        for component in COMPONENTS:
            wanted = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(path, leaf.shape))
                for path, leaf in leaves.items()
                if components[path] == component
            }
            arrays |= self.read(component, wanted)
            if progress is not None:
                progress(len(arrays), len(leaves))
        return fill(weights, arrays)

    def read(self, component: str, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The parameters of one component.

        Args:
            component: one of `COMPONENTS`.
            wanted: shape, dtype and sharding of each of its parameters, by dotted path.

        Raises:
            InputError: the arrays are damaged or of other shapes.
        """
        shapes = {path: leaf.shape for path, leaf in wanted.items()}
        joined = {t.path: t for t in resolve(shapes) if t.row.heads is not None} if self._format == _JOINED else {}
        arrays = self._restore(component, wanted | {path: _joined(t, wanted[path]) for path, t in joined.items()})
        for path in joined:
            arrays[path] = _split(arrays[path], wanted[path])
        return arrays

    def _restore(self, component: str, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        import orbax.checkpoint as ocp  # late: as in `convert`

        restore = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            try:
                return checkpointer.restore((self.directory / "weights" / _folder(component)).absolute(), restore)
            except Exception as error:  # Orbax and TensorStore raise all kinds
                reason = f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}".splitlines()[0]
                reason = reason.split(". See full TensorStore details")[0]
                raise InputError(
                    f"the {component} weights in {self.directory} cannot be read ({reason}); convert again"
                ) from None


def _joined(target: Target, wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A parameter with heads and their width as one axis, cut as `wanted` is."""
    sharding = wanted.sharding
    if isinstance(sharding, NamedSharding):
        first = target.row.heads[0] + target.row.stacked
        spec = (*sharding.spec, *[None] * (len(wanted.shape) - len(sharding.spec)))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec[: first + 1], *spec[first + 2 :]))
    return jax.ShapeDtypeStruct(target.joined_shape, wanted.dtype, sharding=sharding)


def _split(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """What `_joined` asked for, as `wanted` is; each device has the heads already that it keeps."""
    return jax.jit(partial(jnp.reshape, shape=wanted.shape), out_shardings=wanted.sharding)(x)
