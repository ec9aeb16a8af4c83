"""A worker: claims blocks, feeds their requests to the model, and publishes a block when its last line is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bagel_jax.batch.claims import Claims, worker_name
from bagel_jax.batch.job import Block, JobFile, read_line
from bagel_jax.batch.output import JobFolder, Part
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

    block: Block
    part: Part
    said: list[dict[str, Any]]
    requests: list[Request | Exception]
    started: float
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    fed: bool = False  # all its requests were given to the model

    @property
    def whole(self) -> bool:
        return len(self.records) == len(self.said)


class Worker:
    """One of the workers of a job; see this package.

    Args:
        job: the file.
        folder: its results.
        shard_size: lines of a block.
        usual, seed: see `read_line`.
        dead_after: seconds without a sign of life after which another worker's block is taken over.
        tell: called with `Counts` after each line.
    """

    def __init__(
        self,
        job: JobFile,
        folder: JobFolder,
        shard_size: int,
        usual: Mapping[str, Any],
        seed: int = 0,
        *,
        dead_after: float = 30.0,
        tell: Callable[[Counts], None] = lambda _: None,
    ):
        self._job, self._folder, self._size = job, folder, shard_size
        self._usual, self._seed, self._dead_after, self._tell = usual, seed, dead_after, tell
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
                if not left or self.stopped:
                    return
                time.sleep(_LOOK_SECONDS)  # others have those
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
        read = (read_line(line, self._job.path.parent, self._usual, self._seed) for line in block.lines)
        said, requests = map(list, zip(*read, strict=True))
        part = self._folder.part(block.number, claim, said)
        now = self._open[block.number] = _Open(block, part, said, requests, time.perf_counter())
        for i, request in enumerate(requests):
            if self.stopped:
                return
            if isinstance(request, Exception):
                self._failed(now, i, request)
            else:
                # Ids are free to choose, also twice; what the engine goes by is not.
                yield replace(request, request_id=f"{block.number}:{i}")
        now.fed = True
        self._publish(now)

    def _note(self, request: Request, outcome: Result | Exception) -> None:
        number, i = map(int, request.request_id.split(":"))
        now = self._open.get(number)
        if now is None:  # let go of
            return
        if isinstance(outcome, Exception):
            self._failed(now, i, outcome)
        else:
            try:
                came = now.part.save(i, outcome)
            except OSError:
                if self._claims.mine(number):
                    raise
                self._open.pop(number, None)  # taken over, its files removed
                return
            record = {"status": "ok", "error": None, **came, **told(request, outcome)}
            self._add(now, i, record)
        self._publish(now)

    def _failed(self, now: _Open, i: int, error: Exception) -> None:
        kind = type(error).__name__
        now.errors[kind] = now.errors.get(kind, 0) + 1
        sentence = str(error) if isinstance(error, InputError) else f"{kind}: {error}"
        self.counts.errors += 1
        self._add(now, i, {"status": "error", "error": sentence, "kind": kind})

    def _add(self, now: _Open, i: int, record: dict[str, Any]) -> None:
        now.records[i] = now.said[i] | record
        self.counts.done += 1
        self._tell(self.counts)

    def _publish(self, now: _Open) -> None:
        """Publishes a block if it is whole and still this worker's."""
        number = now.block.number
        if not (now.fed and now.whole):
            return
        with self._ending:
            if self._open.pop(number, None) is None:
                return
            if not self._claims.mine(number) or self._folder.done(number):
                now.part.drop()
            else:
                seconds = time.perf_counter() - now.started
                stats = {"lines": len(now.said), "errors": now.errors, "seconds": round(seconds, 3)}
                now.part.publish([now.records[i] for i in range(len(now.said))], stats)
                self.counts.blocks += 1
            self._claims.release(number)
