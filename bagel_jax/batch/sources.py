"""Where a job's requests come from: a file of them, or a folder of images; each one a line of JSON here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from bagel_jax.batch.files import file_fingerprint, open_file
from bagel_jax.batch.folder import ImageFolder
from bagel_jax.batch.parquet import ParquetRows
from bagel_jax.batch.places import Place, parent, place
from bagel_jax.errors import InputError


class Source(Protocol):
    """What a job is read from.

    One may also have `count() -> float | None`: how many requests there are, as far as is known without reading on.
    Only what progress is told depends on it.

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
        self.name, self.base, self._path = str(path), parent(path), path
        self._seen = 0, 0  # bytes and lines, as far as the file was ever read
        with open_file(path) as file:
            self._size = file.seek(0, os.SEEK_END)

    def lines(self) -> Iterator[bytes]:
        """All lines but blank ones."""
        with open_file(self._path) as file:
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
        """Its length, its beginning and its end."""
        return file_fingerprint(self._path)


def open_source(job: str, modality: str | None = None, prompts: Sequence[str] | None = None) -> Source:
    """What a command line calls JOB: a folder of images, a `.parquet` file, or else a JSONL file.

    Args:
        job: its path or URL; a folder is one of this machine.
        modality, prompts: what is to be done with the images of a folder.

    Raises:
        InputError: it cannot be read, or there are prompts and no folder, or the other way round.
    """
    path = place(job)
    if isinstance(path, Path) and path.is_dir():
        return ImageFolder(path, modality, prompts)
    if prompts is not None:
        raise InputError(f"--prompts was given for {path}, whose lines have their own; it is for a folder of images")
    return ParquetRows(path) if job.lower().endswith(".parquet") else JsonLines(path)
