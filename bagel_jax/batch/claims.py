"""Who works on which block: files that only one can make.

`claims/00007.0` claims block 7. Its worker touches it every few seconds. One that has stood still for long is a dead
worker's: `00007.1` then claims the block anew, and so on. Whoever is slow rather than dead finds that when it is done
and keeps its results to itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from typing import Any

from bagel_jax.batch.places import Place
from bagel_jax.batch.store import open_folder

_TOUCH_SECONDS = 2.0
_CLAIM = re.compile(r"\d+\.\d+")


class Claims:
    """The claims of one worker.

    Args:
        folder: where the files are, for all workers of a job.
        worker: its name.
        dead_after: seconds that a claim of another worker may stand still, by this worker's clock.
    """

    def __init__(self, folder: Place, worker: str, dead_after: float):
        self._folder, self._worker, self._dead_after = open_folder(folder), worker, dead_after
        self._mine: dict[int, str] = {}
        self._seen: dict[str, tuple[Any, float]] = {}  # others' claims: when touched, and since when known to us
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="claims", daemon=True)
        self._thread.start()

    def take(self, block: int) -> int | None:
        """Claims a block; returns the number of the claim, above 0 where a dead worker had it, or None: another's."""
        last = self._last(block)  # one look: a second might see a claim that another has made since
        if not self._free(last):
            return None
        number = 0 if last is None else _number(last) + 1
        name = f"{block:05d}.{number}"
        if not self._folder.create(name, self._worker.encode()):  # another was faster, or has just removed the folder
            return None
        with self._lock:
            self._mine[block] = name
        return number

    def free(self, block: int) -> bool:
        """Whether nobody has the block, or a dead worker."""
        return self._free(self._last(block))

    def blocks(self) -> set[int]:
        """All blocks that are claimed, by whomever."""
        return {int(name.partition(".")[0]) for name in self._names("")}

    def mine(self, block: int) -> bool:
        """Whether the block is still this worker's."""
        return block in self._mine and self._last(block) == self._mine[block]

    def release(self, block: int) -> None:
        """Lets go of a block: it is done, or somebody else is to do it."""
        with self._lock:
            last = self._mine.pop(block, None)
        if last is None:
            return
        for number in range(_number(last) + 1):  # the last one at the end, or one before it would be the last
            self._folder.remove(f"{block:05d}.{number}")

    def close(self) -> None:
        """Lets go of all blocks."""
        self._over.set()
        self._thread.join()
        for block in list(self._mine):
            self.release(block)
        self._folder.clear("*.tmp")  # of those who died; who is just claiming a block does so again
        self._folder.remove_if_empty()  # or others have claims

    def _names(self, prefix: str) -> list[str]:
        return list(filter(_CLAIM.fullmatch, self._folder.names(prefix)))

    def _last(self, block: int) -> str | None:
        return max(self._names(f"{block:05d}."), key=_number, default=None)

    def _free(self, last: str | None) -> bool:
        return last is None or self._dead(last)

    def _dead(self, claim: str) -> bool:
        try:
            touched = self._folder.stamp(claim)
            owner = self._folder.read(claim).decode(errors="replace")
        except OSError:
            return False  # released just now
        if _process_is_gone(owner):
            return True
        before, since = self._seen.get(claim, (None, 0.0))
        if before != touched:  # clocks of machines differ, so a claim's age is counted by ours
            self._seen[claim] = touched, time.monotonic()
            return False
        return time.monotonic() - since > self._dead_after

    def _keep_alive(self) -> None:
        while not self._over.wait(_TOUCH_SECONDS):
            for block in list(self._mine):
                # Not while it is released, which in an object store would make it anew.
                with self._lock, contextlib.suppress(OSError):  # it was taken over, or the disk has a bad moment
                    if block in self._mine:
                        self._folder.touch(self._mine[block])


def _number(claim: str) -> int:
    return int(claim.rpartition(".")[2])


def host_name() -> str:
    """This machine, or this container, whose processes have numbers of their own."""
    with contextlib.suppress(OSError):
        return f"{os.uname().nodename}.{os.stat('/proc/self/ns/pid').st_ino}"
    return os.uname().nodename


def worker_name() -> str:
    """What no other worker is called: its host and process."""
    return f"{host_name()}-{os.getpid()}-{os.urandom(3).hex()}"


def _process_is_gone(worker: str) -> bool:
    """Whether a worker was a process of this very machine and has ended."""
    host, process, _ = (*worker.rsplit("-", 2), "", "")[:3]
    if host != host_name() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
