"""The folder of a job: which job it is, and the parts that are done.

`job.json` says which job it is. `part-00007.jsonl` has a record a line of block 7; it appears last, whole, and says
that the block is done. Its images are in `part-00007/`, its counts in `part-00007.stats.json`. What a worker writes
meanwhile is in `part-00007.NUMBER.tmp/`, by the number of its claim.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bagel_jax.errors import InputError
from bagel_jax.request import Result
from bagel_jax.results import json_line

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class JobFolder:
    """A job's results.

    Args:
        path: the folder, which need not be there.
        job: what tells this job from others.

    Raises:
        InputError: the folder is another job's, or cannot be written to.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            new = path / f"job.{os.getpid()}.tmp"
            new.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
            with contextlib.suppress(FileExistsError):
                os.link(new, path / "job.json")  # which is made once, by whoever is first
            new.unlink()
            there = json.loads((path / "job.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"--output {path} cannot be written to ({error.strerror}); give another folder") from None
        except ValueError:
            raise InputError(f"{path / 'job.json'} is damaged; give another folder") from None
        for name, value in job.items():
            if not isinstance(there, dict) or there.get(name) != json.loads(json.dumps(value)):
                raise InputError(
                    f"--output {path} is of another job ({name} differs, see job.json there); give another folder"
                )

    @property
    def claims(self) -> Path:
        """Where workers claim blocks."""
        return self.path / "claims"

    def done(self, block: int) -> bool:
        """Whether a block's results are there."""
        return self._records(block).exists()

    def part(self, block: int, claim: int, said: Sequence[Mapping[str, Any]]) -> Part:
        """Where the results of a block's lines are put meanwhile; what dead workers left of it is removed."""
        for left in self.path.glob(f"part-{block:05d}.*.tmp*"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        return Part(self.path, block, claim, file_names(said))

    def stats(self) -> list[dict[str, Any]]:
        """The counts of the blocks that are done."""
        return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(self.path.glob("part-*.stats.json"))]

    def summarize(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Writes and returns `summary.json`, of all blocks."""
        errors: dict[str, int] = {}
        stats = self.stats()
        for part in stats:
            for kind, count in part["errors"].items():
                errors[kind] = errors.get(kind, 0) + count
        lines = sum(part["lines"] for part in stats)
        summary = {"lines": lines, "ok": lines - sum(errors.values()), "errors": errors, "parts": len(stats), **more}
        _write(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def _records(self, block: int) -> Path:
        return self.path / f"part-{block:05d}.jsonl"


class Part:
    """The results of a block that is in work.

    Args:
        folder: the job's.
        block, claim: their numbers.
        files: what the image of each line is called, without its ending.
    """

    def __init__(self, folder: Path, block: int, claim: int, files: Sequence[str]):
        self._name, self._files = f"part-{block:05d}", files
        self._folder, self._images = folder, folder / f"{self._name}.{claim}.tmp"
        self._images.mkdir(exist_ok=True)

    def save(self, i: int, result: Result) -> dict[str, Any]:
        """Writes the image of the block's line i; returns what a record says of it and of the text."""
        record: dict[str, Any] = {"text": result.text, "image": None, "size": None}
        if result.image is not None:
            file = f"{self._files[i]}.png"
            result.image.save(self._images / file)
            record["image"] = f"{self._name}/{file}"
            record["size"] = {"height": result.image.height, "width": result.image.width}
        return record

    def publish(self, records: list[dict[str, Any]], stats: Mapping[str, Any]) -> None:
        """Makes all results of the block visible; the records come last."""
        images = self._folder / self._name
        if images.exists():  # of a worker that died here
            shutil.rmtree(images)
        if any(self._images.iterdir()):
            self._images.rename(images)
        else:
            self._images.rmdir()
        _write(self._folder / f"{self._name}.stats.json", json.dumps(stats) + "\n")
        _write(self._folder / f"{self._name}.jsonl", "".join(map(json_line, records)))

    def drop(self) -> None:
        """Removes what there is."""
        shutil.rmtree(self._images, ignore_errors=True)


def file_names(said: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the files of lines are called: as its id where that can be and none before it is, else by its number."""
    names: dict[str, str] = {}
    for one in said:
        name = str(one["id"])
        if not _PLAIN.fullmatch(name) or name.lower() in names:
            name = f"line-{one['line']}"
        while name.lower() in names:
            name += "_"
        names[name.lower()] = name
    return list(names.values())


def _write(path: Path, text: str) -> None:
    """A whole file, at once; on the disk before it is seen."""
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
