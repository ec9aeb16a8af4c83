"""Several processes as one: on a TPU slice each host runs the same command, and so do the processes of a GPU cluster.

Process 0 takes requests and writes results; the others do what it decides (`engine/drivers/lockstep.py`). Which of them
a process is, and where the first one listens, is found by JAX on TPU VMs, under SLURM, Open MPI and GKE.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from bagel_jax.command import DONE, FAILED
from bagel_jax.errors import InputError

# Seconds after which a process that is not heard of counts as dead; then all others end.
_HEARTBEAT = 30
# JAX ends them by an abort, with a trace and no chance to say anything. This process of a few lines, which waits for
# the end of standard input, says it for them.
_LAST_WORDS = """
import sys
if not sys.stdin.buffer.read():
    print("error: a process of this run is gone, or this one was ended by force, and none can go on without all "
          "others; what was finished is kept, so run the same command on every host again", file=sys.stderr)
"""


def add_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of which `join` takes the values."""
    group.add_argument(
        "--coordinator",
        metavar="ADDRESS",
        help="this is one of several processes, which all run this command: HOST:PORT of process 0, or auto where JAX "
        "finds it (TPU VMs, SLURM, GKE)",
    )
    group.add_argument(
        "--num-processes", type=int, metavar="N", help="with --coordinator HOST:PORT: how many there are"
    )
    group.add_argument("--process-id", type=int, metavar="I", help="with HOST:PORT: which one this is")


def check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Raises `InputError` unless the values go together."""
    numbers = num_processes, process_id
    if coordinator is None or coordinator == "auto":
        if any(number is not None for number in numbers):
            raise InputError(
                f"--num-processes and --process-id are {num_processes} and {process_id} with --coordinator "
                f"{coordinator or 'not given'}; they go with --coordinator HOST:PORT"
            )
        return
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InputError(f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0, or auto")
    if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise InputError(
            f"--num-processes is {num_processes} and --process-id {process_id}; both are needed, the first how many "
            "processes there are and the second a number below it"
        )


class Team:
    """This process among the others.

    Args:
        several: whether there are others.
        first: whether this is process 0.
    """

    def __init__(self, several: bool, first: bool):
        self._several, self.first = several, first

    def begin(self) -> None:
        """Process 0 has found everything in order: all load the model."""
        self._say(True)

    def close(self) -> None:
        """Process 0 ends; if it has not begun, so do the others."""
        self._say(False)

    def follow(self, open_model: Callable[[], Any]) -> int:
        """In the others: their part of the work, if process 0 begins; returns the exit code.

        They read no file but the model's, and write none.

        Raises:
            InputError: the model cannot be opened.
        """
        try:
            if _from_first(False):
                open_model().follow()
            return DONE
        except InputError:
            raise
        except Exception as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED

    def _say(self, begin: bool) -> None:
        if self._several:
            self._several = False
            _from_first(begin)


def _from_first(flag: bool) -> bool:
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(flag))


def join(coordinator: str | None, num_processes: int | None = None, process_id: int | None = None) -> Team:
    """Makes this process one of several, before anything else asks for devices; no coordinator: it is the only one.

    Raises:
        InputError: the values do not go together, or nothing tells where the others are.
    """
    check(coordinator, num_processes, process_id)
    if coordinator is None:
        return Team(several=False, first=True)
    # Before JAX has something to do at the exit: where another process is gone, that is what it aborts over.
    _leave_last_words()
    import jax

    address = None if coordinator == "auto" else coordinator
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--coordinator is {coordinator}, with which this process finds no others "
            f"({' '.join(str(error).split())[:300]}); give HOST:PORT of process 0, --num-processes and --process-id"
        ) from None
    return Team(several=jax.process_count() > 1, first=jax.process_index() == 0)


def _leave_last_words() -> None:
    """Has it said if this process does not come to its end."""
    command = [sys.executable, "-c", _LAST_WORDS]
    # In a session of its own, or Ctrl-C would end it first.
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def well() -> None:
        with contextlib.suppress(BrokenPipeError):
            watcher.communicate(b"well")

    atexit.register(well)
