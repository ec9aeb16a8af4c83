"""Where a job's files are: in a folder of this machine, or in an object store, `gs://` or `s3://`, through fsspec.

A `Folder` is all that workers need of a place. What they write appears whole or not at all. In a local folder files
have other names until they are whole; in a store a file is whole by itself, so what is not to be seen yet stays on
this machine until then.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from bagel_jax.errors import InputError

EXTRAS = {"gs": "gcs", "s3": "s3"}  # by the beginning of a URL: the extra of this package that reads it
MAX_IMAGE_BYTES = 256 * 2**20  # of an image in an object store
_BLOCK_BYTES = 2**20  # read at once
_AT_ONCE = 16  # files that are read or written at a time
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
        _client(scheme)
    except ImportError:
        raise InputError(
            f"{name} needs a package that is not installed; run pip install -e '.[{EXTRAS[scheme]}]' in the folder of "
            "bagel_jax"
        ) from None
    except Exception as error:  # a client's own, of whatever kind
        raise InputError(f"{name} cannot be reached ({_sentence(error)}); see docs/batch.md for credentials") from None
    return f"{scheme}://{rest.strip('/')}"


@contextlib.contextmanager
def open_file(where: Place) -> Iterator[BinaryIO]:
    """A file to read from, little by little.

    Raises:
        OSError: it cannot be read, also later.
    """
    if isinstance(where, Path):
        with where.open("rb") as file:
            yield file
    else:
        with _as_os_error(where), io.BufferedReader(_opened(where), _BLOCK_BYTES) as file:
            yield file


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
        file = _opened(self.url)
        if file.size > MAX_IMAGE_BYTES:
            raise OSError(f"it has {file.size:,} bytes, at most {MAX_IMAGE_BYTES:,} are read")
        return io.BufferedReader(file, _BLOCK_BYTES)


@dataclass(frozen=True)
class Names:
    """What names of images in a job start from: `Names(base) / name` is the file."""

    base: Place

    def __truediv__(self, name: str) -> Path | StoredFile:
        scheme, mark, _ = name.partition("://")
        if mark and scheme in ("http", "https"):
            raise InputError(f"image {name} is on the web, where nothing is fetched from; give the path of an image")
        if mark:
            return StoredFile(place(name))
        if isinstance(self.base, Path) or name.startswith("/"):
            return Path(self.base, name)
        scheme, _, folder = self.base.partition("://")
        return StoredFile(f"{scheme}://{posixpath.normpath(f'{folder}/{name}')}")


class Folder(Protocol):
    """A folder of files, which need not be there. Names have `/` between their parts. Methods raise `OSError`."""

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file that is not there yet; returns whether it did. Of several at once, one does."""

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, in place of what is there."""

    def read(self, name: str) -> bytes:
        """A small file."""

    def read_all(self, names: Iterable[str]) -> Iterable[bytes]:
        """Many small files, in their order."""

    def exists(self, name: str) -> bool:
        """Whether a file is there."""

    def names(self, prefix: str) -> list[str]:
        """Files and folders right here, those whose names begin so."""

    def remove(self, name: str) -> None:
        """Removes a file if it is there."""

    def remove_folder(self, name: str) -> None:
        """Removes a folder with all that is in it."""

    def remove_if_empty(self) -> None:
        """Removes this folder if nothing is in it."""

    def touch(self, name: str) -> None:
        """Changes the stamp of a file."""

    def stamp(self, name: str) -> Any:
        """What changes when a file is touched, by the seconds at the latest."""

    def workspace(self, name: str) -> Path:
        """A new folder of this machine for what is not to be seen yet, called so where all can see it."""

    def clear(self, pattern: str) -> None:
        """Removes what dead workers left in place of files that were not whole yet."""

    def put_file(self, file: Path, name: str) -> None:
        """Moves a file from a workspace here."""

    def put_folder(self, folder: Path, name: str) -> None:
        """Moves a workspace with all that is in it here, in place of what is there; if there is nothing, removes it."""


def open_folder(where: Place) -> Folder:
    """A folder, wherever it is."""
    return _Local(where) if isinstance(where, Path) else _Stored(where)


class _Local:
    def __init__(self, path: Path):
        self._path = path

    def create(self, name: str, data: bytes) -> bool:
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = _temporary(path)
        try:
            new.write_bytes(data)
            os.link(new, path)
        except (FileExistsError, FileNotFoundError):  # another was faster, or has just removed the folder
            return False
        finally:
            new.unlink(missing_ok=True)
        return True

    def write(self, name: str, data: bytes) -> None:
        new = _temporary(self._path / name)
        with new.open("wb") as file:  # on the disk before it is seen
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path / name)

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def read_all(self, names: Iterable[str]) -> Iterable[bytes]:
        return map(self.read, names)

    def exists(self, name: str) -> bool:
        return (self._path / name).exists()

    def names(self, prefix: str) -> list[str]:
        try:
            return [name for name in os.listdir(self._path) if name.startswith(prefix)]
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        shutil.rmtree(self._path / name, ignore_errors=True)

    def remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self._path.rmdir()

    def touch(self, name: str) -> None:
        os.utime(self._path / name)

    def stamp(self, name: str) -> Any:
        return (self._path / name).stat().st_mtime_ns

    def workspace(self, name: str) -> Path:
        folder = self._path / name
        folder.mkdir(exist_ok=True)
        return folder

    def clear(self, pattern: str) -> None:
        for left in self._path.glob(pattern):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def put_file(self, file: Path, name: str) -> None:
        file.replace(self._path / name)

    def put_folder(self, folder: Path, name: str) -> None:
        there = self._path / name
        if there.exists():  # of a worker that died here
            shutil.rmtree(there)
        folder.rename(there) if any(folder.iterdir()) else folder.rmdir()


class _Stored:
    def __init__(self, url: str):
        scheme, _, self._path = url.partition("://")
        self._fs, self._scheme = _client(scheme), scheme

    def create(self, name: str, data: bytes) -> bool:
        with self._asked(name):
            try:
                self._fs.pipe_file(self._at(name), data, mode="create")
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):  # removed since
                    # A client asks again when no answer came, and then finds what it wrote itself.
                    return self._fs.cat_file(self._at(name)) == data
                return False
            except OSError as error:
                response = getattr(error.__cause__, "response", {})
                if response.get("Error", {}).get("Code") == "ConditionalRequestConflict":
                    return False  # S3's answer when another writes or removes the file at that moment
                raise
        return True

    def write(self, name: str, data: bytes) -> None:
        with self._asked(name):
            self._fs.pipe_file(self._at(name), data)

    def read(self, name: str) -> bytes:
        with self._asked(name):
            return self._fs.cat_file(self._at(name))

    def read_all(self, names: Iterable[str]) -> Iterable[bytes]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from pool.map(self.read, names)

    def exists(self, name: str) -> bool:
        with self._asked(name):
            return self._fs.exists(self._at(name))

    def names(self, prefix: str) -> list[str]:
        with self._asked(prefix):
            try:
                found = self._fs.ls(self._path, detail=False)
            except FileNotFoundError:
                return []
        names = (posixpath.basename(path.rstrip("/")) for path in found)
        return [name for name in names if name.startswith(prefix)]

    def remove(self, name: str) -> None:
        with self._asked(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def remove_folder(self, name: str) -> None:
        there = open_folder(f"{self._scheme}://{self._at(name)}")
        for file in there.names(""):
            there.remove(file)

    def remove_if_empty(self) -> None:
        pass  # there are no folders in a store, but in names

    def touch(self, name: str) -> None:
        self.write(name, self.read(name))  # not if it is gone: that would claim the block again

    def stamp(self, name: str) -> Any:
        with self._asked(name):
            info = self._fs.info(self._at(name))
        return [info.get(key) for key in ("generation", "LastModified", "ETag", "created")]

    def workspace(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"bagel_jax-{name}."))

    def clear(self, pattern: str) -> None:
        pass  # files have no other names before

    def put_file(self, file: Path, name: str) -> None:
        with self._asked(name):
            self._fs.put_file(str(file), self._at(name))
        file.unlink()

    def put_folder(self, folder: Path, name: str) -> None:
        files = list(folder.iterdir())
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(self.put_file, files, [f"{name}/{file.name}" for file in files]):
                pass
        folder.rmdir()

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _asked(self, name: str) -> contextlib.AbstractContextManager[None]:
        return _as_os_error(f"{self._scheme}://{self._at(name)}")


@functools.cache
def _client(scheme: str) -> Any:
    """A filesystem of fsspec, the same one for all threads; what others do is seen at once."""
    import fsspec  # here: only whoever has files in an object store needs it

    client = fsspec.filesystem(scheme, use_listings_cache=False, **_OPTIONS.get(scheme, {}))
    # Not a page on standard error beside the sentence; whoever has set up logging still gets it.
    logging.getLogger(type(client).__module__.partition(".")[0]).addHandler(logging.NullHandler())
    return client


def _opened(url: str) -> Any:
    scheme, _, path = url.partition("://")
    return _client(scheme).open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")


@contextlib.contextmanager
def _as_os_error(url: str) -> Iterator[None]:
    """Clients raise errors of all kinds, many without a number; out comes an `OSError` that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such file or bucket", url) from None
    except Exception as error:
        raise OSError(getattr(error, "errno", None) or errno.EIO, _sentence(error), url) from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _temporary(path: Path) -> Path:
    """What a file is called until it is whole; no other worker, on whatever machine, calls one so."""
    return path.with_name(f"{path.name}.{os.urandom(6).hex()}.tmp")
