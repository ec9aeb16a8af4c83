"""A directory that a model can be loaded from, whichever form its weights have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.checkpoint.load import PublishedCheckpoint, ShardingOf, on_default_device
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.checkpoint.store import MANIFEST, ConvertedCheckpoint
from bagel_jax.errors import InputError
from bagel_jax.models.weights import Weights


class ModelSource:
    """A checked checkpoint, its weights not loaded yet."""

    def __init__(self, directory: Path, checkpoint: PublishedCheckpoint | ConvertedCheckpoint):
        self.directory, self.config = directory, checkpoint.config
        self.checkpoint = checkpoint

    @classmethod
    def open(cls, directory: Path) -> ModelSource:
        """Finds out which form a directory has, and checks it.

        Raises:
            InputError: there is no such directory, or it holds no whole checkpoint.
        """
        if not directory.is_dir():
            raise InputError(f"model {directory} is not a directory; give one that holds a BAGEL checkpoint")
        if (directory / MANIFEST).exists():
            return cls(directory, ConvertedCheckpoint(directory))
        files = CheckpointFiles(directory)
        checkpoint = PublishedCheckpoint(files, read_config(files))
        checkpoint.check()
        return cls(directory, checkpoint)

    def load(
        self, dtype, progress: Callable[[int, int], None] | None = None, sharding: ShardingOf = on_default_device
    ) -> Weights:
        """The weights in `dtype`; see `PublishedCheckpoint.load`."""
        return self.checkpoint.load(dtype, progress, sharding)
