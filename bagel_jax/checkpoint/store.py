"""Converted checkpoints: Orbax arrays, with all that a model needs besides.

A converted checkpoint is a directory with `bagel_jax.json` (format, sizes, the dtype of every parameter, the bytes of
every file), one Orbax checkpoint a component in `weights/`, and the tokenizer and json files of its source. It is
written beside its place and renamed when whole, so an interrupted conversion leaves nothing that loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bagel_jax.checkpoint.assemble import assemble
from bagel_jax.checkpoint.files import read_json
from bagel_jax.checkpoint.folder import copy_small_files, written
from bagel_jax.checkpoint.load import PublishedCheckpoint, ShardingOf, on_default_device, targets_of
from bagel_jax.checkpoint.table import COMPONENTS, Target
from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.models.weights import Weights, abstract_weights, fill

MANIFEST = "bagel_jax.json"
# In format 1 heads and their width were one axis, as in the published layout.
_FORMAT, _JOINED = 2, 1
# Arrays are cut into pieces of at most this many bytes, so that a device can read its part of one.
_CHUNK_BYTES = 64 * 2**20
# Pieces that are kept while an array is read, since several devices may have a part of one: somewhat more than
# `assemble` reads at a time.
_CACHE_BYTES = 640 * 2**20


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
            # Cut by layers first, as they are read.
            cut = {path: (0,) if x.nbytes > _CHUNK_BYTES else () for path, x in arrays.items()}
            pieces = {path: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes) for path, axes in cut.items()}
            args = ocp.args.PyTreeSave(arrays, save_args=pieces)
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
        self.targets = targets_of(self.config)
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
        arrays: dict[str, jax.Array] = {}
        if progress is not None:
            progress(0, len(self.targets))
        for target in self.targets:
            arrays[target.path] = self.read(target, jnp.dtype(dtype), sharding(target.path, target.shape))
            if progress is not None:
                progress(len(arrays), len(self.targets))
        return fill(abstract_weights(self.config, dtype), arrays)

    def stored_dtype(self, target: Target) -> np.dtype:
        """The dtype that a parameter has on disk."""
        return self.dtypes[target.path]

    def read(self, target: Target, dtype, sharding: jax.sharding.Sharding) -> jax.Array:
        """One parameter as an array of `dtype`; only the parts are read that devices keep, each once.

        Raises:
            InputError: the array is damaged or of another shape.
        """
        # Not through Orbax, which reads a part once for each device that keeps it, and a component's arrays together.
        import tensorstore as ts  # late: as Orbax in `convert`

        kind, component = np.dtype(dtype), target.row.component
        joined = target.row.heads is not None and self._format == _JOINED
        expected = target.joined_shape if joined else target.shape
        base = (self.directory / "weights" / _folder(component)).absolute().as_uri()
        # What is missing would read as zeros.
        spec = {"driver": "zarr", "fill_missing_data_reads": False}
        spec["kvstore"] = {"driver": "ocdbt", "base": base, "path": f"{target.path}/"}
        with self._damage_told(component):
            context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
            stored = ts.open(spec, context=context, open=True, read=True).result()
            if stored.shape != expected:
                raise ValueError(f"{target.path} has shape {list(stored.shape)}, the model's has {list(expected)}")
            cast = ts.cast(stored, kind.name)
        by_layers = target.row.stacked and stored.chunk_layout.read_chunk.shape[0] < stored.shape[0]

        def part(index: tuple[slice, ...]) -> np.ndarray:
            there = target.joined_index(index) if joined else index
            with self._damage_told(component):
                values = cast[there].read(order="C").result()
            return values.reshape([s.stop - s.start for s in index])

        return assemble(target.shape, kind, sharding, part, stacked=by_layers)

    @contextmanager
    def _damage_told(self, component: str) -> Iterator[None]:
        """Turns what TensorStore raises, which is of all kinds, into an `InputError`."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0].split(" [tensorstore_spec")[0]
            raise InputError(
                f"the {component} weights in {self.directory} cannot be read ({reason}); convert again"
            ) from None
