"""Training checkpoints: Orbax, written whole or not at all, in the background, the data's position with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grain
import jax
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
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, save_interval_steps=save_every, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """Steps done in the latest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, batches: grain.DatasetIterator, *, last: bool = False) -> None:
        """Saves, if it is time to or the run ends; returns before everything is written."""
        if step == self.latest or not (last or self._manager.should_save(step)):
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(batches))
        self._manager.save(step, args=args, force=last)

    def restore(self, abstract: Any, batches: grain.DatasetIterator) -> TrainState:
        """The latest state, laid out as `abstract`; `batches` goes on where it was.

        Raises:
            InputError: the checkpoint is of another model or optimiser.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=grain.checkpoint.CheckpointRestore(batches)
        )
        try:
            return self._manager.restore(self.latest, args=args)["state"]
        except (ValueError, KeyError) as error:
            raise InputError(
                f"the training checkpoint {self.latest} in {self._manager.directory} does not fit this configuration "
                f"({str(error).splitlines()[0]}); use another output folder"
            ) from None

    def restore_average(self) -> dict[str, jax.Array]:
        """The averaged weights of the latest checkpoint, as NumPy arrays by path."""
        restored = self._manager.restore(self.latest, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
        return restored["state"]["ema"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
