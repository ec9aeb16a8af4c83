"""The folder of a job: which job it is, and the parts that are done.

`job.json` says which job it is. `part-00007.jsonl` has a record a line of block 7; it appears last, whole, and says
that the block is done. Its images are in `part-00007/`, or with the records in `part-00007.tar`, its counts in
`part-00007.stats.json`. What a worker writes meanwhile is in `part-00007.NUMBER.tmp/`, by the number of its claim; of
an object store in a temporary folder of the worker's machine. Images may be there without their records, of a worker
that died while it published them: the next one has the same names for them. When errors are tried again, the counts
come last, with one more in `retries`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bagel_jax.batch.openai_answers import answer
from bagel_jax.batch.places import Place, inside
from bagel_jax.batch.records import apart, failed, uniform
from bagel_jax.batch.stats import summary
from bagel_jax.batch.store import Folder, open_folder
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
        return inside(self.path, "claims")

    @property
    def retries(self) -> Place:
        """Where workers claim blocks whose errors they try again; others, for whom the job is done, leave it alone."""
        return inside(self.path, "claims-retry")

    def has(self, name: str) -> bool:
        """Whether a file of the whole job is there."""
        return self._folder.exists(name)

    def done(self, block: int) -> bool:
        """Whether a block's results are there."""
        if self._done is None:  # one look for all that are there: each would be a request to an object store
            self._done = self._parts("jsonl")
        if block not in self._done and self._folder.exists(f"part-{block:05d}.jsonl"):
            self._done.add(block)
        return block in self._done

    def count(self) -> int:
        """How many blocks are done."""
        return len(self._parts("jsonl"))

    def records(self, block: int) -> list[dict[str, Any]]:
        """What a block that is done has of its lines."""
        with self._folder.open(f"part-{block:05d}.jsonl") as file:
            return list(map(json.loads, file))

    def stats(self, block: int) -> dict[str, Any]:
        """The counts of a block that is done."""
        return json.loads(self._folder.read(f"part-{block:05d}.stats.json"))

    def all_stats(self) -> dict[int, dict[str, Any]]:
        """The counts of all blocks that are done, in order."""
        numbers = [number for number in sorted(self._parts("stats.json")) if self.done(number)]
        read = self._folder.read_all([f"part-{number:05d}.stats.json" for number in numbers])
        return dict(zip(numbers, map(json.loads, read), strict=True))

    @contextlib.contextmanager
    def images(self, block: int) -> Iterator[Callable[[str], bytes]]:
        """What reads images of a block that is done, by the names that its records give them."""
        if self.tar:
            with self._folder.open(f"part-{block:05d}.tar") as file, tarfile.open(fileobj=file) as archive:
                yield lambda name: archive.extractfile(name.partition("/")[2]).read()
        else:
            yield self._folder.read

    def write(self, name: str, data: bytes) -> None:
        """Writes a file of the whole job, as a whole."""
        with contextlib.suppress(FileNotFoundError):  # another worker is at the same, and has just removed what is left
            self._folder.write(name, data)

    def part(self, block: int, claim: int, files: Sequence[Sequence[str]], kept: Sequence[bool] | None = None) -> Part:
        """Where the results of a block's lines are put meanwhile; what dead workers left of it is removed."""
        self._folder.clear(f"part-{block:05d}.*.tmp*")
        return Part(self._folder, block, claim, files, kept, tar=self.tar)

    def summarize(self) -> dict[str, Any]:
        """When all blocks are done: writes and returns `summary.json`, and removes what killed workers left."""
        found = summary(list(self.all_stats().values()))
        self._folder.remove_folder("claims")
        for name in "job.json", "summary.json", "sheet.png":  # not of parts: somebody may be at work on errors
            self._folder.clear(f"{name}.*.tmp")
        self.write("summary.json", (json.dumps(found, indent=1) + "\n").encode())
        return found

    def _parts(self, ending: str) -> set[int]:
        """The numbers of parts that have a file with this ending."""
        found = (re.fullmatch(r"part-(\d+)\.(.+)", name) for name in self._folder.names("part-"))
        return {int(name[1]) for name in found if name and name[2] == ending}


class Part:
    """The results of a block that is in work.

    Args:
        folder: the job's.
        block, claim: their numbers.
        files: see `file_names`.
        kept: whether a line's results stay as they are; None: the block is not done yet.
        tar: whether images go into a tar file.
    """

    def __init__(
        self,
        folder: Folder,
        block: int,
        claim: int,
        files: Sequence[Sequence[str]],
        kept: Sequence[bool] | None,
        *,
        tar: bool,
    ):
        self._name, self._files, self._kept, self._tar = f"part-{block:05d}", files, kept, tar
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
        """Makes all results of the block visible; what says that they are there comes last."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.drop)
            if self._tar:
                tar = self._draft("tar", stack)
                self._write_tar(tar, records)
                self._folder.put_file(tar, f"{self._name}.tar")
            whole = self._draft("jsonl", stack)
            # One in memory: there may be images in them.
            _write(whole, (json_line(self._told(record)).encode() for record in records))
            if self._tar:
                self.drop()
            else:  # no record has names of images yet that come beside others, but one that is an error
                self._folder.put_folder(self._images, self._name, beside=self._kept is not None)
            counts = self._draft("stats.json", stack)
            _write(counts, [json.dumps(stats).encode(), b"\n"])
            files = [(counts, f"{self._name}.stats.json"), (whole, f"{self._name}.jsonl")]
            for file, name in files if self._kept is None else reversed(files):
                self._folder.put_file(file, name)

    def drop(self) -> None:
        """Removes what there is."""
        shutil.rmtree(self._images, ignore_errors=True)

    def _draft(self, ending: str, stack: contextlib.ExitStack) -> Path:
        """Where a file of the part may be written before it is put; what is left there in the end is removed."""
        file = self._folder.draft(f"{self._name}.{ending}")
        stack.callback(file.unlink, missing_ok=True)
        return file

    def _told(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record in the form in which its line was asked."""
        if "openai" in record:
            return answer(record, self._taken, embed=not self._tar)
        return record if "response" in record else uniform(record)  # the former was told before and is kept

    def _taken(self, image: str) -> bytes:
        """An image that is to stand in its record; in a tar file it has a place of its own as well."""
        file = self._images / Path(image).name
        data = file.read_bytes()
        if not self._tar:
            file.unlink()
        return data

    def _write_tar(self, file: Path, records: Sequence[Mapping[str, Any]]) -> None:
        """A member a file: each record, and beside it, called alike, its image, as webdataset's readers have it.

        What failed is no sample: readers expect the same files of all.
        """
        with contextlib.ExitStack() as stack:
            archive = stack.enter_context(tarfile.open(file, "w"))
            before = None
            if self._kept is not None:
                old = stack.enter_context(self._folder.open(f"{self._name}.tar"))
                before = stack.enter_context(tarfile.open(fileobj=old))
            there = set() if before is None else set(before.getnames())
            for i, (files, record) in enumerate(zip(self._files, records, strict=True)):
                if failed(record):
                    continue
                for name, one in zip(files, apart(self._told(record)), strict=True):
                    data = json_line(one).encode()
                    member = tarfile.TarInfo(f"{name}.json")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                    image = self._images / f"{name}.png"
                    if before is not None and self._kept[i]:
                        if image.name in there:
                            member = before.getmember(image.name)
                            archive.addfile(member, before.extractfile(member))
                    elif image.exists():
                        archive.add(image, image.name, filter=_without_owner)


def _write(file: Path, lines: Iterable[bytes]) -> None:
    """A file that has only to be moved to where it shall be; on the disk before it is seen."""
    with file.open("wb") as writer:
        writer.writelines(lines)
        writer.flush()
        os.fsync(writer.fileno())


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same bytes whoever writes them, and when."""
    member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode = 0, 0, 0, "", "", 0o644
    return member


def file_names(
    said: Sequence[Mapping[str, Any]], counts: Sequence[int], num_images: int, *, dots: bool
) -> list[list[str]]:
    """What the images of lines are called, without `.png`.

    As the line's id where that can be and none before it is, else by its number; with `-0`, `-1`, … of several. How
    many images other lines have makes no difference: one that is an error today may have some when it is tried again.

    Args:
        said: `id` and `line` of each line, and `openai` of those in that form.
        counts: how many images each has.
        num_images: how many a line may have that does not say it.
        dots: whether there may be dots in names, which webdataset takes for the beginning of an ending.
    """
    names, found = set(), []
    for one, count in zip(said, counts, strict=True):
        most = one.get("openai", {}).get("n") or num_images
        ends = [f"-{k}" for k in range(most)] if most > 1 else []
        wanted = str(one["id"])
        if not _PLAIN.fullmatch(wanted) or ("." in wanted and not dots):
            wanted = f"line-{one['line']}"
        if any((wanted + end).lower() in names for end in ("", *ends)):
            wanted = f"line-{one['line']}"
        while any((wanted + end).lower() in names for end in ("", *ends)):
            wanted += "_"
        found.append([wanted + end for end in ends] if count > 1 else [wanted])
        names |= {(wanted + end).lower() for end in ("", *ends)}
    return found
