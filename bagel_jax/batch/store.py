"""Where a job's results are: in a folder of this machine, or in an object store.

A `Folder` is all that workers need of a place. What they write appears whole or not at all. In a local folder files
have other names until they are whole; in a store a file is whole by itself, so what is not to be seen yet stays on
this machine until then.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from bagel_jax.batch.places import Place, as_os_error, client, opened

_AT_ONCE = 16  # files that are read or written at a time


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

    def open(self, name: str) -> BinaryIO:
        """A file to read from, little by little."""

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

    def draft(self, name: str) -> Path:
        """A new name of a file of this machine, to be written and then put here; called so where all can see it."""

    def clear(self, pattern: str) -> None:
        """Removes what dead workers left in place of files that were not whole yet."""

    def put_file(self, file: Path, name: str) -> None:
        """Moves a draft here."""

    def put_folder(self, folder: Path, name: str, *, beside: bool = False) -> None:
        """Moves a workspace with the files in it here; one without files is removed.

        It comes in place of what is there, or its files come `beside` those.
        """


def open_folder(where: Place) -> Folder:
    """A folder, wherever it is."""
    return _Local(where) if isinstance(where, Path) else _Stored(where)


class _Local:
    def __init__(self, path: Path):
        self._path = path

    def create(self, name: str, data: bytes) -> bool:
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = temporary(path)
        try:
            new.write_bytes(data)
            os.link(new, path)
        except (FileExistsError, FileNotFoundError):  # another was faster, or has just removed the folder
            return False
        finally:
            new.unlink(missing_ok=True)
        return True

    def write(self, name: str, data: bytes) -> None:
        new = temporary(self._path / name)
        with new.open("wb") as file:  # on the disk before it is seen
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path / name)

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def read_all(self, names: Iterable[str]) -> Iterable[bytes]:
        return map(self.read, names)

    def open(self, name: str) -> BinaryIO:
        return opened(self._path / name)

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

    def draft(self, name: str) -> Path:
        return temporary(self._path / name)

    def clear(self, pattern: str) -> None:
        for left in self._path.glob(pattern):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def put_file(self, file: Path, name: str) -> None:
        file.replace(self._path / name)

    def put_folder(self, folder: Path, name: str, *, beside: bool = False) -> None:
        there, files = self._path / name, list(folder.iterdir())
        if not beside:
            if there.exists():  # of a worker that died here
                shutil.rmtree(there)
            folder.rename(there) if files else folder.rmdir()
            return
        for file in files:
            there.mkdir(exist_ok=True)
            file.replace(there / file.name)
        folder.rmdir()


class _Stored:
    def __init__(self, url: str):
        scheme, _, self._path = url.partition("://")
        self._fs, self._scheme = client(scheme), scheme

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

    def open(self, name: str) -> BinaryIO:
        return opened(f"{self._scheme}://{self._at(name)}")

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

    def draft(self, name: str) -> Path:
        descriptor, file = tempfile.mkstemp(prefix=f"bagel_jax-{name}.")
        os.close(descriptor)
        return Path(file)

    def clear(self, pattern: str) -> None:
        pass  # files have no other names before

    def put_file(self, file: Path, name: str) -> None:
        with self._asked(name):
            self._fs.put_file(str(file), self._at(name))
        file.unlink()

    def put_folder(self, folder: Path, name: str, *, beside: bool = False) -> None:
        files = list(folder.iterdir())  # what is there of a worker that died has the same names
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(self.put_file, files, [f"{name}/{file.name}" for file in files]):
                pass
        folder.rmdir()

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _asked(self, name: str) -> contextlib.AbstractContextManager[None]:
        return as_os_error(f"{self._scheme}://{self._at(name)}")


def temporary(path: Path) -> Path:
    """What a file is called until it is whole; no other worker, on whatever machine, calls one so."""
    return path.with_name(f"{path.name}.{os.urandom(6).hex()}.tmp")
