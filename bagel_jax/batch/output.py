"""The folder of a job: which job it is, and the parts that are done.

`job.json` says which job it is. `part-00007.jsonl` has a record a line of block 7; it appears last, whole, and says
that the block is done. Its images are in `part-00007/`, or with the records in `part-00007.tar`, its counts in
`part-00007.stats.json`. What a worker writes meanwhile is in `part-00007.NUMBER.tmp/`, by the number of its claim. In
an object store it is in a temporary folder of the worker's machine, and images may be there without their records,
of a worker that died while it published them: the next one has the same names for them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bagel_jax.batch.store import Folder, Place, open_folder
from bagel_jax.errors import InputError
from bagel_jax.request import Result
from bagel_jax.results import json_line

_RECORDS = re.compile(r"part-(\d+)\.jsonl")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class JobFolder:
    """A job's results.

    Args:
        path: the folder, which need not be there.
        job: what tells this job from others; with the `format` webdataset images go into tar files.

    Raises:
        InputError: the folder is another job's, or cannot be written to.
    """

    def __init__(self, path: Place, job: Mapping[str, Any]):
        self.path, self.tar = path, job.get("format") == "webdataset"
        self._folder, self._done = open_folder(path), None
        try:
            # It is made once, by whoever is first; and who ends the job just now may remove what is not whole.
            while not self._folder.exists("job.json"):
                self._folder.create("job.json", f"{json.dumps(job, indent=1)}\n".encode())
            there = json.loads(self._folder.read("job.json"))
        except OSError as error:
            raise InputError(f"--output {path} cannot be written to ({error.strerror}); give another folder") from None
        except ValueError:
            raise InputError(f"{path}/job.json is damaged; give another folder") from None
        for name, value in job.items():
            if not isinstance(there, dict) or there.get(name) != json.loads(json.dumps(value)):
                raise InputError(
                    f"--output {path} is of another job ({name} differs, see job.json there); give another folder"
                )

    @property
    def claims(self) -> Place:
        """Where workers claim blocks."""
        return self.path / "claims" if isinstance(self.path, Path) else f"{self.path}/claims"

    def done(self, block: int) -> bool:
        """Whether a block's results are there."""
        if self._done is None:  # one look for all that are there: each would be a request to an object store
            found = filter(None, map(_RECORDS.fullmatch, self._folder.names("part-")))
            self._done = {int(name[1]) for name in found}
        if block not in self._done and self._folder.exists(f"part-{block:05d}.jsonl"):
            self._done.add(block)
        return block in self._done

    def part(self, block: int, claim: int, files: Sequence[Sequence[str]]) -> Part:
        """Where the results of a block's lines are put meanwhile; what dead workers left of it is removed."""
        self._folder.clear(f"part-{block:05d}.*.tmp*")
        return Part(self._folder, block, claim, files, tar=self.tar)

    def summarize(self) -> dict[str, Any]:
        """When all blocks are done: writes and returns `summary.json`, and removes what killed workers left."""
        names = [name for name in self._folder.names("part-") if name.endswith(".stats.json")]
        stats = list(map(json.loads, self._folder.read_all(names)))
        errors = sum((Counter(part["errors"]) for part in stats), Counter())
        lines = sum(part["lines"] for part in stats)
        summary = {"lines": lines, "ok": lines - errors.total(), "errors": errors, "parts": len(stats)}
        self._folder.remove_folder("claims")
        self._folder.clear("*.json.*.tmp")
        with contextlib.suppress(FileNotFoundError):  # another worker did so, and has written the same
            self._folder.write("summary.json", f"{json.dumps(summary, indent=1)}\n".encode())
        return summary


class Part:
    """The results of a block that is in work.

    Args:
        folder: the job's.
        block, claim: their numbers.
        files: see `file_names`.
        tar: whether images go into a tar file.
    """

    def __init__(self, folder: Folder, block: int, claim: int, files: Sequence[Sequence[str]], *, tar: bool):
        self._name, self._files, self._tar = f"part-{block:05d}", files, tar
        self._folder, self._images = folder, folder.workspace(f"{self._name}.{claim}.tmp")

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
        if self._tar:
            self._folder.put_file(self._write_tar(records), f"{self._name}.tar")
            self.drop()
        else:
            self._folder.put_folder(self._images, self._name)
        self._folder.write(f"{self._name}.stats.json", f"{json.dumps(stats)}\n".encode())
        self._folder.write(f"{self._name}.jsonl", "".join(map(json_line, records)).encode())

    def drop(self) -> None:
        """Removes what there is."""
        shutil.rmtree(self._images, ignore_errors=True)

    def _write_tar(self, records: Sequence[Mapping[str, Any]]) -> Path:
        """A member a file: each record, and beside it, called alike, its image, as webdataset's readers have it."""
        new = self._images / f"{self._name}.tar"
        with tarfile.open(new, "w") as archive:
            for files, record in zip(self._files, records, strict=True):
                whole = {key: value for key, value in record.items() if key != "images"}
                for name, one in zip(files, record.get("images", [record]), strict=True):
                    data = json_line(whole | one).encode()
                    member = tarfile.TarInfo(f"{name}.json")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                    image = self._images / f"{name}.png"
                    if image.exists():
                        archive.add(image, image.name, filter=_without_owner)
        return new


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
