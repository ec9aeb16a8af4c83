"""Where a job's requests come from: lines of JSON, one a request."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from bagel_jax.errors import InputError

_END_BYTES = 2**16  # of a file's beginning and end that its fingerprint holds


class Source(Protocol):
    """What a job is read from.

    One may also have `count() -> float | None`: how many requests there are, as far as is known without reading on.
    Only what progress is told depends on it.

    Attributes:
        name: what errors call it.
        base: the folder that images' paths start from.
    """

    name: str
    base: Path

    def lines(self) -> Iterator[bytes]:
        """All requests anew, as JSON; one is in memory."""

    def fingerprint(self) -> dict[str, Any]:
        """By what the source is known again."""


class JsonLines:
    """A JSONL file of requests. Blank lines count for nothing.

    Raises:
        InputError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.name, self.base, self._path = str(path), path.parent, path
        self._seen = 0, 0  # bytes and lines, as far as the file was ever read
        try:
            with path.open("rb"):
                self._size = path.stat().st_size
        except OSError as error:
            raise InputError(f"the job {path} cannot be read ({error.strerror}); give a file of requests") from None

    def lines(self) -> Iterator[bytes]:
        """All lines but blank ones."""
        with self._path.open("rb") as file:
            if file.read(3) != b"\xef\xbb\xbf":  # what some editors put before UTF-8
                file.seek(0)
            read, count = file.tell(), 0
            for line in file:
                read += len(line)
                if line.strip():
                    count += 1
                    self._seen = max(self._seen, (read, count))
                    yield line
            self._seen = read, count

    def count(self) -> float | None:
        """How many lines there are if the rest are as long as those that were read."""
        read, count = self._seen
        return count * self._size / read if read else None

    def fingerprint(self) -> dict[str, Any]:
        """Its length, its beginning and its end, however long it is."""
        with self._path.open("rb") as file:
            ends = file.read(_END_BYTES)
            file.seek(max(0, self._size - _END_BYTES))
            ends += file.read(_END_BYTES)
        return {"bytes": self._size, "ends_sha256": hashlib.sha256(ends).hexdigest()}


def open_source(job: str) -> Source:
    """What a command line calls JOB.

    Raises:
        InputError: it cannot be read.
    """
    return JsonLines(Path(job))
