"""A job's file, wherever it lies: the one place that opens it."""

from __future__ import annotations

import hashlib
import os
from typing import Any, BinaryIO

from bagel_jax.batch.places import Place, opened
from bagel_jax.errors import InputError

_END_BYTES = 2**16  # of a file's beginning and end that its fingerprint holds


def open_file(path: Place) -> BinaryIO:
    """The file of a job, to be read.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return opened(path)
    except OSError as error:
        raise InputError(f"the job {path} cannot be read ({error.strerror}); give a file of requests") from None


def file_fingerprint(path: Place) -> dict[str, Any]:
    """A file's length, its beginning and its end, however long it is."""
    with open_file(path) as file:
        ends = file.read(_END_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES))
        ends += file.read(_END_BYTES)
    return {"bytes": size, "ends_sha256": hashlib.sha256(ends).hexdigest()}
