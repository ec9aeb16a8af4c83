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
from bagel_jax.batch.places import Place
from bagel_jax.batch.records import failed
from bagel_jax.batch.stats import tally
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
    kept: list[dict[str, Any] | None]  # by lines: records that stay as they are
    said: list[dict[str, Any]]
    began: float  # by the clock on the wall, for other workers
    # Of each line, what came of its requests, in their order; one entry of a line that is none.
    came: list[list[dict[str, Any] | None]]
    missing: int  # entries
    fed: bool = False  # all its requests were given to the model

    def records(self) -> list[dict[str, Any]]:
        """A record a line."""
        lines = zip(self.kept, self.said, self.came, strict=True)
        return [kept or said | (came[0] if len(came) == 1 else _several(came)) for kept, said, came in lines]


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
        retry_errors: whether lines that are errors when `run` begins are computed anew.
    """

    def __init__(
        self,
        job: Job,
        folder: JobFolder,
        shard_size: int,
        usual: Defaults,
        *,
        dead_after: float = 30.0,
        retry_errors: bool = False,
    ):
        self._job, self._folder, self._size = job, folder, shard_size
        self._usual, self._dead_after, self._retry_errors = usual, dead_after, retry_errors
        self._open: dict[int, _Open] = {}
        self._claims: Claims | None = None
        self._ending = threading.Lock()  # whoever has it publishes, or lets go of everything
        self._retrying = False
        self.counts, self.stopped = Counts(), False

    def run(self, run_many: RunMany, tell: Callable[[Counts], None] = lambda _: None) -> None:
        """Works until every block of the job is done, by this worker or another, or until `stop`.

        Args:
            run_many: `Bagel.run_many`, or what does the same.
            tell: called after each request.

        Raises:
            OSError: the folder cannot be written to any more.
        """
        self._tell = tell
        # Known before anything is done: what fails from now on, here or elsewhere, is not tried again.
        found = self._folder.all_stats() if self._retry_errors else {}
        errors = {number: stats["retries"] for number, stats in found.items() if stats["errors"]}
        self._round(run_many, self._folder.claims, lambda number: not self._folder.done(number))
        self._retrying = bool(errors)
        if errors and not self.stopped:
            self._round(
                run_many,
                self._folder.retries,
                lambda number: number in errors and self._folder.stats(number)["retries"] == errors[number],
            )

    def _round(self, run_many: RunMany, claims: Place, wanted: Callable[[int], bool]) -> None:
        """Works until no block is wanted any more; what is not, once its results are there, says `wanted`."""
        if not any(wanted(block.number) for block in self._job.blocks(self._size)):
            return  # without a model
        self._wanted, self._claims = wanted, Claims(claims, worker_name(), self._dead_after)
        try:
            while not self.stopped:
                left: list[int] = []
                for request, outcome in run_many(self._feed(left)):
                    self._note(request, outcome)
                # Others have those. The file is read again when one of them can be had.
                while left and not self.stopped and not any(map(self._claims.free, left)):
                    time.sleep(_LOOK_SECONDS)
                    left = [number for number in left if wanted(number)]
                if not left:
                    break
            for number in () if self.stopped else self._claims.blocks():  # of those who died when all was done
                if self._claims.take(number) is not None:
                    self._claims.release(number)
        finally:
            self.let_go()

    def lines(self) -> tuple[float, float | None]:
        """How many lines of the job all workers have done, and how many there are, as far as is known.

        Blocks that others have in work are taken to be half done, or in the beginning as far as this worker's.
        """
        if self._retrying:
            return 0.0, None
        own = [1 - block.missing / max(1, sum(map(len, block.came))) for block in list(self._open.values())]
        others = max(0, len(self._claims.blocks()) - len(own))
        far = 0.5 if self.counts.blocks else min([0.5, *own])
        return self._size * (self._folder.count() + sum(own) + others * far), self._job.count()

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
            if not self._wanted(block.number):
                continue
            claim = self._claims.take(block.number)
            if claim is None:
                left.append(block.number)
                continue
            if not self._wanted(block.number):  # done just now, by whose claim that was
                self._claims.release(block.number)
                continue
            yield from self._requests(block, claim)

    def _requests(self, block: Block, claim: int) -> Iterator[Request]:
        said, requests = map(list, zip(*(self._read(line) for line in block.lines), strict=True))
        counts = [len(some) if isinstance(some, tuple) else 1 for some in requests]
        names = file_names(said, counts, self._usual.num_images, dots=not self._folder.tar)
        kept: list[dict[str, Any] | None] = [None] * len(said)
        again = self._folder.done(block.number)
        if again:
            kept = [None if failed(record) else record for record in self._folder.records(block.number)]
        part = self._folder.part(block.number, claim, names, [one is not None for one in kept] if again else None)
        came = [[None] * count if one is None else [] for one, count in zip(kept, counts, strict=True)]
        now = _Open(block.number, part, kept, said, time.time(), came, sum(map(len, came)))
        self._open[block.number] = now
        for i, some in enumerate(requests):
            if kept[i] is not None:
                continue
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
        said, requests = read_line(line, self._job.source.base, self._usual)
        if isinstance(requests, tuple):
            said.setdefault("prompt", requests[0].prompt)  # of those with `inputs`
        return said, requests

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
            if not self._claims.mine(number) or not self._wanted(number):
                now.part.drop()
            else:
                records = now.records()
                now.part.publish(records, self._stats(now, records))
                self.counts.blocks += 1
            self._claims.release(number)

    def _stats(self, now: _Open, records: list[dict[str, Any]]) -> dict[str, Any]:
        """What is counted of a block; see `stats.summary`."""
        before = self._folder.stats(now.number) if self._folder.done(now.number) else {"worked": [], "retries": -1}
        return {
            "lines": len(records),
            "errors": Counter(record["kind"] for record in records if failed(record)),
            **tally(record for record in records if not failed(record)),
            "worked": [*before["worked"], [round(now.began, 3), round(time.time(), 3)]],
            "retries": before["retries"] + 1,
        }
