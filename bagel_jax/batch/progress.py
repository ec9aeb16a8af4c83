"""How far a job is, in one line: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta

from tqdm import tqdm

from bagel_jax.batch.worker import Counts

_LOG_SECONDS = 30.0  # between lines in a log
_LOOK_SECONDS = 5.0  # between looks at what all workers have done
_BAR = "{percentage:3.0f}%|{bar:20}| {desc}"


def device_memory() -> tuple[int, int] | None:
    """Bytes in use on this process's first device, and those it has; None where it does not say."""
    import jax  # late: arguments are looked at without it

    stats = jax.local_devices()[0].memory_stats() or {}
    return (stats["bytes_in_use"], stats["bytes_limit"]) if {"bytes_in_use", "bytes_limit"} <= stats.keys() else None


class Progress:
    """Tells of a job while a worker is at it; called with the worker's counts after each request.

    Args:
        how: `bar`, `log`, `none`, or `auto`: a bar where standard error is a terminal.
        lines: how many lines of the job are done by all workers, and how many it has, as far as is known.
        memory: bytes in use on the device, and those it has; None where it does not say.
        clock: seconds.
    """

    def __init__(
        self,
        how: str,
        lines: Callable[[], tuple[float, float | None]],
        memory: Callable[[], tuple[int, int] | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        bar = how == "bar" or (how == "auto" and sys.stderr.isatty())
        self._bar = tqdm(total=100, bar_format=_BAR, file=sys.stderr, leave=True) if bar else None
        self._silent, self._every = not bar and how == "none", _LOOK_SECONDS if bar else _LOG_SECONDS
        self._lines, self._memory, self._clock = lines, memory, clock
        self._told = clock()
        self._counts = Counts()
        # When the first request was done, and how many lines and requests then.
        self._first: tuple[float, float, int] | None = None

    def __call__(self, counts: Counts) -> None:
        """After a request."""
        self._counts, now = counts, self._clock()
        if self._first is None and not self._silent and counts.done > counts.errors:
            # What came before says nothing of the rest: loading, compiling, errors.
            self._first = now, self._lines()[0], counts.done
        if self._first is not None and now - self._told >= self._every:
            self._tell(now)

    def close(self) -> None:
        """Ends the bar, at where the job is."""
        if self._bar is not None:
            if self._first is not None:
                self._tell(self._clock())
            self._bar.close()

    def _tell(self, now: float) -> None:
        self._told = now
        done, total = self._lines()
        text = self._text(now, done, total)
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.n = 100 * min(1.0, done / total) if total else 0
            self._bar.set_description_str(text)

    def _text(self, now: float, done: float, total: float | None) -> str:
        counts = self._counts
        began, lines, requests = self._first
        seconds = now - began
        said = [f"{counts.done:,} done", f"{counts.errors:,} errors"]
        if seconds:
            said.append(f"{(counts.done - requests) / seconds:.2f} requests/s")
        if total:
            if self._bar is None:  # which has it in front
                said.append(f"{100 * min(1.0, done / total):.0f}% of the job")
            if done > lines and seconds:
                said.append(f"ETA {timedelta(seconds=round(max(0.0, total - done) * seconds / (done - lines)))}")
        memory = self._memory()
        if memory is not None:
            said.append(f"{memory[0] / 2**30:.1f} of {memory[1] / 2**30:.1f} GiB")
        return ", ".join(said)
