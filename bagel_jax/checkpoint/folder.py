"""Writing a directory that is there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from bagel_jax.errors import InputError

_UNFINISHED = "unfinished"  # an empty file that marks a directory as this module's to remove


@contextmanager
def written(destination: Path) -> Iterator[Path]:
    """A new directory to be filled, beside `destination`, which it becomes when the block ends without an error.

    After an error or a kill it stays behind under its other name, and the next call clears it away.

    Raises:
        InputError: the destination is there already or cannot be made.
    """
    if destination.exists():
        raise InputError(f"{destination} is there already; give a directory that is not, or remove it")
    partial = destination.with_name(destination.name + ".partial")
    if (partial / _UNFINISHED).exists():
        shutil.rmtree(partial)  # what an interrupted run left
    elif partial.exists():
        raise InputError(f"{partial} is in the way and of no interrupted run; remove it or give another destination")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{partial} cannot be made ({error.strerror}); give another destination") from None
    (partial / _UNFINISHED).touch()
    yield partial
    (partial / _UNFINISHED).unlink()
    partial.rename(destination)


def copy_small_files(source: Path, destination: Path, leave_out: Container[str] = ()) -> None:
    """Copies a checkpoint's tokenizer and json files, but for indices of shards and the names in `leave_out`."""
    for file in sorted(source.iterdir()):
        wanted = file.suffix in (".json", ".txt", ".jinja", ".model") and not file.name.endswith(".index.json")
        if wanted and file.name not in leave_out:
            shutil.copyfile(file, destination / file.name)
