"""Training checkpoints: Orbax, written whole or not at all, in the background, the data's position with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from bagel_jax.errors import InputError
from bagel_jax.train.step import TrainState


class TrainCheckpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        save_every: steps between them.
        keep: how many of the latest stay.
    """

    def __init__(self, folder: Path, save_every: int = 1, keep: int = 1):
        self._save_every = save_every
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """Steps done in the latest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def due(self, step: int, *, last: bool) -> bool:
        """Whether it is time to save, or the run ends. (Orbax's own rule always saves the first step.)"""
        return step != self.latest and (last or step % self._save_every == 0)

    def save(self, step: int, state: TrainState, batches: grain.DatasetIterator) -> None:
        """Saves; returns before everything is written."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(batches))
        self._manager.save(step, args=args, force=True)

    def restore(self, abstract: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """The latest state, laid out as `abstract`; `batches` goes on where it was.

        Raises:
            InputError: the checkpoint is of another model, or of batches that were made in another way.
        """
        self._check({name: array.shape for name, array in abstract.trainable.items()})
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=grain.checkpoint.CheckpointRestore(batches)
        )
        try:
            return self._manager.restore(self.latest, args=args)["state"]
        except (ValueError, KeyError) as error:
            raise InputError(
                f"the training checkpoint {self.latest} in {self._manager.directory} cannot be gone on from "
                f"({str(error).splitlines()[0]}); leave objective.kind, data.sources and data.workers as they were, or "
                "use another output folder"
            ) from None

    def _check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """That what is trained is what the latest checkpoint holds; Orbax would tell it in hundreds of lines."""
        stored = {name: tuple(array.shape) for name, array in self._stored()["trainable"].items()}
        for name in sorted(stored | wanted):
            if stored.get(name) != wanted.get(name):
                saved, trained = (
                    f"with shape {list(shapes[name])}" if name in shapes else "not at all"
                    for shapes in (stored, wanted)
                )
                raise InputError(
                    f"the training checkpoint {self.latest} in {self._manager.directory} has {name} {saved}, and this "
                    f"configuration trains it {trained}; use another output folder"
                )

    def _stored(self) -> Any:
        """Shapes in the latest checkpoint, a tree as `TrainState`."""
        return ocp.StandardCheckpointHandler().metadata(self._manager.directory / str(self.latest) / "state")

    def restore_average(self) -> dict[str, np.ndarray]:
        """The averaged weights of the latest checkpoint by path, on whatever devices it was written."""
        item = {"ema": dict.fromkeys(self._stored()["ema"], 0)}
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=kinds, partial_restore=True)
        return self._manager.restore(self.latest, args=ocp.args.Composite(state=args))["state"]["ema"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
