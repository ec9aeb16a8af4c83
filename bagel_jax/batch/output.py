"""The folder of a job: which job it is, and the parts that are done.

`job.json` says which job it is. `part-00007.jsonl` has a record a line of block 7; it appears last, whole, and says
that the block is done. Its images are in `part-00007/`, or with the records in `part-00007.tar`, its counts in
`part-00007.stats.json`. What a worker writes meanwhile is in `part-00007.NUMBER.tmp/`, by the number of its claim.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bagel_jax.batch.openai_answers import answer
from bagel_jax.batch.records import apart, failed, uniform
from bagel_jax.errors import InputError
from bagel_jax.request import Result
from bagel_jax.results import json_line

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class JobFolder:
    """A job's results.

    Args:
        path: the folder, which need not be there.
        job: what tells this job from others; with the `format` webdataset images go into tar files.

    Raises:
        InputError: the folder is another job's, or cannot be written to.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]):
        self.path, self.tar = path, job.get("format") == "webdataset"
        try:
            path.mkdir(parents=True, exist_ok=True)
            while not (path / "job.json").exists():
                new = _temporary(path / "job.json")
                new.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
                # It is made once, by whoever is first; and who ends the job just now may remove what is not.
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    os.link(new, path / "job.json")
                new.unlink(missing_ok=True)
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

    def part(self, block: int, claim: int, files: Sequence[Sequence[str]]) -> Part:
        """Where the results of a block's lines are put meanwhile; what dead workers left of it is removed."""
        for left in self.path.glob(f"part-{block:05d}.*.tmp*"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        return Part(self.path, block, claim, files, tar=self.tar)

    def summarize(self) -> dict[str, Any]:
        """When all blocks are done: writes and returns `summary.json`, and removes what killed workers left."""
        stats = [json.loads(file.read_text(encoding="utf-8")) for file in self.path.glob("part-*.stats.json")]
        errors = sum((Counter(part["errors"]) for part in stats), Counter())
        lines = sum(part["lines"] for part in stats)
        summary = {"lines": lines, "ok": lines - errors.total(), "errors": errors, "parts": len(stats)}
        shutil.rmtree(self.claims, ignore_errors=True)
        for left in self.path.glob("*.json.*.tmp"):
            left.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another worker did so, and has written the same
            _write(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def _records(self, block: int) -> Path:
        return self.path / f"part-{block:05d}.jsonl"


class Part:
    """The results of a block that is in work.

    Args:
        folder: the job's.
        block, claim: their numbers.
        files: see `file_names`.
        tar: whether images go into a tar file.
    """

    def __init__(self, folder: Path, block: int, claim: int, files: Sequence[Sequence[str]], *, tar: bool):
        self._name, self._files, self._tar = f"part-{block:05d}", files, tar
        self._folder, self._images = folder, folder / f"{self._name}.{claim}.tmp"
        self._images.mkdir(exist_ok=True)

    def save(self, i: int, k: int, result: Result) -> dict[str, Any]:
        """Writes image k of the block's line i; returns what a record says of it and of the text."""
        record: dict[str, Any] = {"text": result.text, "image": None, "size": None}
        if result.image is not None:
            file = f"{self._files[i][k]}.png"
            result.image.save(self._images / file)
            record["image"] = f"{self._name}{'.tar' if self._tar else ''}/{file}"
            record["size"] = {"height": result.image.height, "width": result.image.width}
        return record

    def publish(self, records: list[dict[str, Any]], stats: Mapping[str, Any]) -> None:
        """Makes all results of the block visible; the records come last."""
        images = self._folder / self._name
        if images.exists():  # of a worker that died here
            shutil.rmtree(images)
        if self._tar:
            self._write_tar(records)
        records_file = self._folder / f"{self._name}.jsonl"
        whole = _written(records_file, map(json_line, map(self._told, records)))  # one in memory: images may be in them
        if self._tar:
            self.drop()
        elif any(self._images.iterdir()):
            self._images.rename(images)
        else:
            self._images.rmdir()
        _write(self._folder / f"{self._name}.stats.json", json.dumps(stats) + "\n")
        whole.replace(records_file)

    def drop(self) -> None:
        """Removes what there is."""
        shutil.rmtree(self._images, ignore_errors=True)

    def _told(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record in the form in which its line was asked."""
        return answer(record, self._taken, embed=not self._tar) if "openai" in record else uniform(record)

    def _taken(self, image: str) -> bytes:
        """An image that is to stand in its record; in a tar file it has a place of its own as well."""
        file = self._images / Path(image).name
        data = file.read_bytes()
        if not self._tar:
            file.unlink()
        return data

    def _write_tar(self, records: Sequence[Mapping[str, Any]]) -> None:
        """A member a file: each record, and beside it, called alike, its image, as webdataset's readers have it.

        What failed is no sample: readers expect the same files of all.
        """
        new = _temporary(self._folder / f"{self._name}.tar")
        with tarfile.open(new, "w") as archive:
            for files, record in zip(self._files, records, strict=True):
                if failed(record):
                    continue
                for name, one in zip(files, apart(self._told(record)), strict=True):
                    data = json_line(one).encode()
                    member = tarfile.TarInfo(f"{name}.json")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                    image = self._images / f"{name}.png"
                    if image.exists():
                        archive.add(image, image.name, filter=_without_owner)
        new.replace(self._folder / f"{self._name}.tar")


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same bytes whoever writes them, and when."""
    member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode = 0, 0, 0, "", "", 0o644
    return member


def file_names(said: Sequence[Mapping[str, Any]], counts: Sequence[int], *, dots: bool) -> list[list[str]]:
    """What the images of lines are called, without `.png`.

    As the line's id where that can be and none before it is, else by its number; with `-0`, `-1`, … of several.

    Args:
        said: `id` and `line` of each line.
        counts: how many images each has.
        dots: whether there may be dots in names, which webdataset takes for the beginning of an ending.
    """
    names, found = set(), []
    for one, count in zip(said, counts, strict=True):
        wanted = str(one["id"])
        if not _PLAIN.fullmatch(wanted) or ("." in wanted and not dots):
            wanted = f"line-{one['line']}"
        ends = [f"-{k}" for k in range(count)] if count > 1 else [""]
        if any((wanted + end).lower() in names for end in ends):
            wanted = f"line-{one['line']}"
        while any((wanted + end).lower() in names for end in ends):
            wanted += "_"
        found.append([wanted + end for end in ends])
        names |= {name.lower() for name in found[-1]}
    return found


def _temporary(path: Path) -> Path:
    """What a file is called until it is whole; no other worker, on whatever machine, calls one so."""
    return path.with_name(f"{path.name}.{os.urandom(6).hex()}.tmp")


def _write(path: Path, text: str) -> None:
    """A whole file, at once; on the disk before it is seen."""
    _written(path, [text]).replace(path)


def _written(path: Path, lines: Iterable[str]) -> Path:
    """A file that has only to be renamed to what it shall be."""
    new = _temporary(path)
    with new.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    return new
