"""A worker: claims blocks, feeds their requests to the model, and publishes a block when its last line is done."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bagel_jax.batch.claims import Claims, worker_name
from bagel_jax.batch.job import Block, Defaults, Job, Line, read_line
from bagel_jax.batch.output import JobFolder, Part, file_names
from bagel_jax.batch.records import failed
from bagel_jax.errors import InputError
from bagel_jax.request import Request, Result
from bagel_jax.results import told

_LOOK_SECONDS = 1.0  # between looks at what other workers have in work

RunMany = Callable[[Iterable[Request]], Iterator[tuple[Request, Result | Exception]]]


@dataclass
class Counts:
    """What this worker has done."""

    done: int = 0
    errors: int = 0
    blocks: int = 0


@dataclass
class _Open:
    """A block in work."""

    number: int
    part: Part
    said: list[dict[str, Any]]  # by lines
    started: float
    # Of each line, what came of its requests, in their order; one entry of a line that is none.
    came: list[list[dict[str, Any] | None]]
    missing: int  # entries
    fed: bool = False  # all its requests were given to the model

    def records(self) -> list[dict[str, Any]]:
        """A record a line."""
        came = (parts[0] if len(parts) == 1 else _several(parts) for parts in self.came)
        return [said | record for said, record in zip(self.said, came, strict=True)]


def _several(came: list[dict[str, Any]]) -> dict[str, Any]:
    """What a record says of several images: an error if one of them has one."""
    wrong = next((one for one in came if one["status"] == "error"), None)
    return {"status": "ok", "error": None} | ({k: wrong[k] for k in _WRONG} if wrong else {}) | {"images": came}


_WRONG = "status", "error", "kind"


class Worker:
    """One of the workers of a job; see this package.

    Args:
        job: the file.
        folder: its results.
        shard_size: lines of a block.
        usual: for lines that do not say otherwise.
        dead_after: seconds without a sign of life after which another worker's block is taken over.
        tell: called with `Counts` after each line.
    """

    def __init__(
        self,
        job: Job,
        folder: JobFolder,
        shard_size: int,
        usual: Defaults,
        *,
        dead_after: float = 30.0,
        tell: Callable[[Counts], None] = lambda _: None,
    ):
        self._job, self._folder, self._size = job, folder, shard_size
        self._usual, self._dead_after, self._tell = usual, dead_after, tell
        self._open: dict[int, _Open] = {}
        self._claims: Claims | None = None
        self._ending = threading.Lock()  # whoever has it publishes, or lets go of everything
        self.counts, self.stopped = Counts(), False

    def run(self, run_many: RunMany) -> None:
        """Works until every block of the job is done, by this worker or another, or until `stop`.

        Args:
            run_many: `Bagel.run_many`, or what does the same.

        Raises:
            OSError: the folder cannot be written to any more.
        """
        if all(self._folder.done(block.number) for block in self._job.blocks(self._size)):
            return  # without a model
        self._claims = Claims(self._folder.claims, worker_name(), self._dead_after)
        try:
            while not self.stopped:
                left: list[int] = []
                for request, outcome in run_many(self._feed(left)):
                    self._note(request, outcome)
                # Others have those. The file is read again when one of them can be had.
                while left and not self.stopped and not any(map(self._claims.free, left)):
                    time.sleep(_LOOK_SECONDS)
                    left = [number for number in left if not self._folder.done(number)]
                if not left:
                    return
        finally:
            self.let_go()

    def stop(self) -> bool:
        """Takes no more requests in; returns whether a block can still be finished by what the model has."""
        self.stopped = True
        return any(block.fed for block in list(self._open.values()))

    def let_go(self) -> None:
        """Removes what is not whole and releases its claims, for others or for later."""
        with self._ending:
            for number in list(self._open):
                self._open.pop(number).part.drop()
            if self._claims is not None:
                self._claims.close()

    def _feed(self, left: list[int]) -> Iterator[Request]:
        """Requests of the blocks that can be claimed; numbers of those that are others' go to `left`."""
        for block in self._job.blocks(self._size):
            if self.stopped:
                return
            if self._folder.done(block.number):
                continue
            claim = self._claims.take(block.number)
            if claim is None:
                left.append(block.number)
                continue
            if self._folder.done(block.number):  # just now, by whose claim that was
                self._claims.release(block.number)
                continue
            yield from self._requests(block, claim)

    def _requests(self, block: Block, claim: int) -> Iterator[Request]:
        said, requests = map(list, zip(*(self._read(line) for line in block.lines), strict=True))
        counts = [len(some) if isinstance(some, tuple) else 1 for some in requests]
        part = self._folder.part(block.number, claim, file_names(said, counts, dots=not self._folder.tar))
        came = [[None] * count for count in counts]
        now = self._open[block.number] = _Open(block.number, part, said, time.perf_counter(), came, sum(counts))
        for i, some in enumerate(requests):
            if isinstance(some, Exception):
                self._failed(now, i, 0, some)
                continue
            for k, request in enumerate(some):
                if self.stopped:
                    return
                # Ids are free to choose, also twice; what the engine goes by is not.
                yield replace(request, request_id=f"{block.number}:{i}:{k}")
        now.fed = True
        self._publish(now)

    def _read(self, line: Line) -> tuple[dict[str, Any], tuple[Request, ...] | Exception]:
        return read_line(line, self._job.source.base, self._usual)

    def _note(self, request: Request, outcome: Result | Exception) -> None:
        number, i, k = map(int, request.request_id.split(":"))
        now = self._open.get(number)
        if now is None:  # let go of
            return
        if isinstance(outcome, Exception):
            self._failed(now, i, k, outcome)
        else:
            try:
                came = now.part.save(i, k, outcome)
            except OSError:
                if self._claims.mine(number):
                    raise
                self._open.pop(number, None)  # taken over, its files removed
                return
            about = {} if len(now.came[i]) == 1 else {"seed": request.seed}
            self._add(now, i, k, {"status": "ok", "error": None, **about, **came, **told(request, outcome)})
        self._publish(now)

    def _failed(self, now: _Open, i: int, k: int, error: Exception) -> None:
        kind = type(error).__name__
        sentence = str(error) if isinstance(error, InputError) else f"{kind}: {error}"
        self._add(now, i, k, {"status": "error", "error": sentence, "kind": kind})

    def _add(self, now: _Open, i: int, k: int, came: dict[str, Any]) -> None:
        now.came[i][k] = came
        now.missing -= 1
        self.counts.done += 1
        self.counts.errors += came["status"] == "error"
        self._tell(self.counts)

    def _publish(self, now: _Open) -> None:
        """Publishes a block if it is whole and still this worker's."""
        number = now.number
        if now.missing or not now.fed:
            return
        with self._ending:
            if self._open.pop(number, None) is None:
                return
            if not self._claims.mine(number) or self._folder.done(number):
                now.part.drop()
            else:
                records = now.records()
                errors = Counter(record["kind"] for record in records if failed(record))
                seconds = round(time.perf_counter() - now.started, 3)
                now.part.publish(records, {"lines": len(records), "errors": errors, "seconds": seconds})
                self.counts.blocks += 1
            self._claims.release(number)
