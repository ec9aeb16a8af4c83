"""What the names of files and folders mean: paths of this machine, or URLs of an object store, `gs://` or `s3://`.

An object store is reached through fsspec, whose clients differ in the errors that they raise; here all are `OSError`s.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bagel_jax.errors import InputError

EXTRAS = {"gs": "gcs", "s3": "s3"}  # by the beginning of a URL: the extra of this package that reads it
MAX_IMAGE_BYTES = 256 * 2**20  # of an image in an object store
_BLOCK_BYTES = 2**20  # read at once
_OPTIONS = {"gs": {"requests_timeout": 120}}  # seconds; gcsfs would wait for ever, s3fs has limits of its own

Place = Path | str  # a file or a folder: a local path, or the URL of one in an object store


def place(name: str) -> Place:
    """What a person calls a file or a folder.

    Raises:
        InputError: a URL of nothing that is read here, or a package is missing.
    """
    scheme, mark, rest = name.partition("://")
    if not mark:
        return Path(name)
    if scheme not in EXTRAS or not rest.strip("/"):
        kinds = " or ".join(f"{known}://BUCKET/PATH" for known in EXTRAS)
        raise InputError(f"{name} is in no place that is known here; give a local path, {kinds}")
    try:
        client(scheme)
    except ImportError:
        raise InputError(
            f"{name} needs a package that is not installed; run pip install -e '.[{EXTRAS[scheme]}]' in the folder of "
            "bagel_jax"
        ) from None
    except Exception as error:  # a client's own, of whatever kind
        raise InputError(f"{name} cannot be reached ({_sentence(error)}); see docs/batch.md for credentials") from None
    return f"{scheme}://{rest.strip('/')}"


def inside(where: Place, name: str) -> Place:
    """What is called so in a folder."""
    return where / name if isinstance(where, Path) else f"{where}/{name}"


def parent(where: Place) -> Place:
    """The folder that something is in."""
    return where.parent if isinstance(where, Path) else where.rpartition("/")[0]


def opened(where: Place) -> BinaryIO:
    """A file to read from, little by little.

    Raises:
        OSError: it cannot be read, also later.
    """
    return where.open("rb") if isinstance(where, Path) else io.BufferedReader(_Raw(where), _BLOCK_BYTES)


@dataclass(frozen=True)
class StoredFile:
    """A file in an object store, of which an `ImageFile` may be."""

    url: str

    def __str__(self) -> str:
        return self.url

    def open(self) -> BinaryIO:
        """To be read from; nothing needs to be closed.

        Raises:
            OSError: it is not there, or has more than `MAX_IMAGE_BYTES`.
        """
        file = opened(self.url)
        size = file.seek(0, io.SEEK_END)
        if size > MAX_IMAGE_BYTES:
            raise OSError(f"it has {size:,} bytes, at most {MAX_IMAGE_BYTES:,} are read")
        file.seek(0)
        return file


@dataclass(frozen=True)
class Names:
    """What names of images in a job start from: `Names(base) / name` is the file."""

    base: Place

    def __truediv__(self, name: str) -> Path | StoredFile:
        if "://" in name:
            return StoredFile(place(name))
        if isinstance(self.base, Path) or name.startswith("/"):
            return Path(self.base, name)
        scheme, _, folder = self.base.partition("://")
        return StoredFile(f"{scheme}://{posixpath.normpath(f'{folder}/{name}')}")


@functools.cache
def client(scheme: str) -> Any:
    """A filesystem of fsspec, the same one for all threads; what others do is seen at once."""
    import fsspec  # here: only whoever has files in an object store needs it

    found = fsspec.filesystem(scheme, use_listings_cache=False, **_OPTIONS.get(scheme, {}))
    # Not a page on standard error beside the sentence; whoever has set up logging still gets it.
    logging.getLogger(type(found).__module__.partition(".")[0]).addHandler(logging.NullHandler())
    return found


class _Raw(io.RawIOBase):
    """A client's file, whose errors are `OSError`s here."""

    def __init__(self, url: str):
        self._url, (scheme, _, path) = url, url.partition("://")
        with as_os_error(url):
            self._file = client(scheme).open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with as_os_error(self._url):
            return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


@contextlib.contextmanager
def as_os_error(url: str) -> Iterator[None]:
    """Clients raise errors of all kinds, many without a number; out comes an `OSError` that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such file or bucket", url) from None
    except Exception as error:
        raise OSError(getattr(error, "errno", None) or errno.EIO, _sentence(error), url) from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
