"""Where a job's requests come from: lines of JSON, one a request."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from bagel_jax.batch.store import Place, open_file, place
from bagel_jax.errors import InputError

_END_BYTES = 2**16  # of a file's beginning and end that its fingerprint holds


class Source(Protocol):
    """What a job is read from.

    Attributes:
        name: what errors call it.
        base: the folder that images' paths start from.
    """

    name: str
    base: Place

    def lines(self) -> Iterator[bytes]:
        """All requests anew, as JSON; one is in memory."""

    def fingerprint(self) -> dict[str, Any]:
        """By what the source is known again."""


class JsonLines:
    """A JSONL file of requests. Blank lines count for nothing.

    Raises:
        InputError: it cannot be read.
    """

    def __init__(self, path: Place):
        self.name, self._path = str(path), path
        self.base = path.parent if isinstance(path, Path) else path.rpartition("/")[0]
        try:
            with open_file(path) as file:
                self._size = file.seek(0, os.SEEK_END)
        except OSError as error:
            raise InputError(f"the job {path} cannot be read ({error.strerror}); give a file of requests") from None

    def lines(self) -> Iterator[bytes]:
        """All lines but blank ones."""
        with open_file(self._path) as file:
            if file.read(3) != b"\xef\xbb\xbf":  # what some editors put before UTF-8
                file.seek(0)
            yield from (line for line in file if line.strip())

    def fingerprint(self) -> dict[str, Any]:
        """Its length, its beginning and its end, however long it is."""
        with open_file(self._path) as file:
            ends = file.read(_END_BYTES)
            file.seek(max(0, self._size - _END_BYTES))
            ends += file.read(_END_BYTES)
        return {"bytes": self._size, "ends_sha256": hashlib.sha256(ends).hexdigest()}


def open_source(job: str) -> Source:
    """What a command line calls JOB.

    Raises:
        InputError: it cannot be read.
    """
    return JsonLines(place(job))
