"""The driver for several hosts: process 0 decides, its commands are broadcast, all processes step alike.

Every process has an engine of the same model and settings. Process 0 takes requests in and gives events out; the others
`follow`. Since an engine does the same for the same commands, all dispatch the same programs in the same order, as
programs over the devices of several hosts need it; when a call is read is a command too, so no process looks at its own
clock or at which array happens to be ready.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from bagel_jax.engine.core import Engine
from bagel_jax.engine.drivers.driver import Driver
from bagel_jax.engine.handle import Handle
from bagel_jax.engine.ticket import CONTEXT, DENOISE, STAGES, Collect, Command, Event, Run
from bagel_jax.inputs.prepare import Prepared

_LOG = logging.getLogger(__name__)

Round = list[Command] | None  # None: the last one
_KEEP_ALIVE = 20  # seconds
_GONE = "another process of the engine is gone"


def broadcast(commands: Round) -> Round:
    """What process 0 calls this with, in every process; the others' argument is not looked at."""
    if jax.process_count() == 1:
        return commands
    data = np.frombuffer(pickle.dumps(commands), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    # Two broadcasts: how much there is, then a power of two of bytes, so that few programs are compiled for it.
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(data))))
    padded = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    return pickle.loads(multihost_utils.broadcast_one_to_all(padded)[:size].tobytes())


def follow(
    engine: Engine,
    listen: Callable[[list[Event]], None] = lambda events: None,
    share: Callable[[Round], Round] = broadcast,
) -> None:
    """What all processes but the first do: carry out commands until the first one closes.

    Args:
        engine: this process's.
        listen: hears the events, which are those of process 0.
        share: gives what process 0 decides; see `broadcast`.

    Raises:
        RuntimeError: a process is gone, or this one has failed as all others have.
    """
    while True:
        try:
            commands = share(None)
        except Exception as error:  # what is at hand raises, of whatever kind
            raise RuntimeError(f"{_GONE} ({' '.join(str(error).split())[:300]}); start all of them again") from error
        if commands is None:
            return
        try:
            events = engine.step(commands)
        except Exception as error:
            raise RuntimeError(f"this process failed ({error!r}); start all of them again") from error
        listen(events)


class LockstepDriver(Driver):
    """Process 0 of an engine over several hosts; a thread of its own makes the rounds.

    A round is what has come in, as many calls as can be dispatched, and the oldest call of each stage read.

    Args:
        engine, load_seconds: see `Driver`.
        share: gives commands to the other processes; see `broadcast`.
    """

    def __init__(
        self, engine: Engine, load_seconds: float | None = None, *, share: Callable[[Round], Round] = broadcast
    ):
        super().__init__(engine, load_seconds)
        self._share, self._closed = share, False
        self._thread = threading.Thread(target=self._live, name="bagel-lockstep")
        self._thread.start()

    def submit(self, prepared: Prepared, **options) -> Handle:
        """See `Driver.submit`; raises RuntimeError once it is closed."""
        with self._inbox:
            if self._closed:
                raise RuntimeError("the engine is closed, here and in all other processes; start them again")
            return super().submit(prepared, **options)

    def close(self) -> None:
        """Cancels what is in work, and ends the rounds here and in all other processes."""
        super().close()
        with self._inbox:
            self._closed = True
            self._changed()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _live(self) -> None:
        while True:
            with self._inbox:
                while not (self._commands or self._handles or self._in_flight or self._closed):
                    if not self._inbox.wait(_KEEP_ALIVE):  # an empty round, or the others would wait for too long
                        break
                if self._closed and not (self._commands or self._in_flight):
                    break
            try:
                self._round()
            except Exception as error:  # a fault of ours, which the other processes have met too: all end
                _LOG.exception("the engine failed")
                with self._inbox:
                    self._closed = True
                    self._commands.clear()
                self._deliver(self._whose(self.engine.give_up(error)), [threading.get_ident()])
        with contextlib.suppress(Exception):  # nobody may be left to hear it
            self._share(None)

    @property
    def _in_flight(self) -> bool:
        return any(self.engine.calls(stage) for stage in STAGES)

    def _round(self) -> None:
        reads = [Collect(stage) for stage in STAGES]
        commands = [*self._drain(), Run(CONTEXT), Run(DENOISE, self._evaluations())]
        shared = self._share([*commands, *reads])
        self._step(shared[: len(commands)])
        for read in reads:  # as the others do, but that the time is taken
            ready = self.engine.pending(read.stage)
            if ready is not None:
                with contextlib.suppress(Exception):  # it is heard of when the call is read
                    ready.block_until_ready()
                self._done(read.stage, time.perf_counter())
            self._step([read])

    def _step(self, commands: list[Command]) -> None:
        events = self.engine.step(commands, time.perf_counter())
        self._deliver(self._whose(events), [threading.get_ident()])
