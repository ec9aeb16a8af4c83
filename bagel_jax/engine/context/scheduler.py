"""Which tokens of which requests the next step computes. On the host; no array of the device is touched."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from bagel_jax.engine.context.jobs import Job, Sequence
from bagel_jax.engine.kv.pool import PagePool
from bagel_jax.engine.kv.prefix_cache import PrefixCache
from bagel_jax.layout import Text, VaeImage, VitImage
from bagel_jax.settings import ServingSettings

# Texts beside an image's block, and sequences with text to prefill, in one step: few, so that there are few programs.
TEXT_BESIDE_IMAGE = 64
MAX_TEXTS = 8


@dataclass
class Piece:
    """Text tokens of one sequence in a step, the markers of an image's block among them."""

    job: Job
    sequence: Sequence
    # Of each token: id, place, RoPE position, kv_end.
    tokens: list[tuple[int, int, int, int]] = field(default_factory=list)


@dataclass
class Image:
    """An image's block in a step, without its markers."""

    job: Job
    sequence: Sequence
    segment: VitImage | VaeImage
    kv_start: int  # of the first token between the markers
    kv_end: int  # of the block, markers included
    rope: int


@dataclass
class StepPlan:
    """What one step computes."""

    rows: list[Job]
    pieces: list[Piece]
    image: Image | None
    copies: list[tuple[int, int]]  # pages to copy first: source, target
    tokens: int = 1  # that each row may decode; more than one only where nothing is prefilled

    def count(self, piece: Piece) -> int:
        """Tokens of a piece's sequence that the step computes, those of an image included."""
        return _planned(piece, self.image)


class Scheduler:
    """First come, first served; who came last gives way when pages run out, and is computed again later."""

    def __init__(self, pool: PagePool, settings: ServingSettings, markers: tuple[int, int]):
        self.pool, self.settings, self._markers = pool, settings, markers
        self.cache = PrefixCache(pool)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # in order of arrival

    def plan(self, tokens: int = 1) -> StepPlan:
        """The next step, in which rows may decode as many as `tokens` tokens if there is nothing else to do."""
        copies: list[tuple[int, int]] = []
        self._admit(copies)
        rows = [job for job in self.running if job.decodes]
        first = any(len(job.sequences[0].tail) == 1 for job in rows)  # somebody waits for a first token
        if first or len(rows) < len(self.running) or not self._room_for_tokens(rows, tokens):
            tokens = 1
        self._allocate_tokens(rows, tokens)
        rows = [job for job in rows if job in self.running]
        pieces, image = self._prefill(self.settings.max_num_batched_tokens - len(rows), copies)
        return StepPlan(rows, pieces, image, copies, tokens)

    def release(self, job: Job) -> None:
        """Gives back all pages of a job and forgets it."""
        for jobs in (self.running, self.waiting):
            if job in jobs:
                jobs.remove(job)
        self._release_pages(job)

    def computed(self, sequence: Sequence, end: int) -> None:
        """Notes that a sequence's tokens up to `end` will have been computed by what is dispatched so far."""
        for placed, key in zip(sequence.segments, sequence.chain, strict=False):
            if self.settings.prefix_cache and sequence.computed < placed.kv_end <= end:
                self.cache.keep(key, sequence.pages[: self._pages(placed.kv_end)], placed.kv_end)
        sequence.computed = end

    def grow(self, sequence: Sequence, length: int) -> bool:
        """Makes sure that a sequence has pages for `length` tokens; False if there are none left."""
        wanted = self._pages(length) - len(sequence.pages)
        if wanted > 0:
            pages = self._allocate(wanted)
            if pages is None:
                return False
            sequence.pages += pages
        return True

    def pages_needed(self, job: Job) -> int:
        """Pages that a job may need in all when it is alone."""
        main, *others = job.sequences
        longest = main.length + (job.decoding.limit if job.decoding is not None else 0)
        if job.decoding is not None and job.prepared.request.makes_image:
            longest += 2  # the thought, as a text, has markers
        count = self._pages(longest)
        for s in others:
            count += self._pages(s.length) - (s.shared // self.settings.page_size if s.source is main else 0)
        return count

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.settings.page_size)

    def _allocate(self, count: int) -> list[int] | None:
        if count > self.pool.num_free:
            self.cache.make_room(count)
        return self.pool.allocate(count)

    def _release_pages(self, job: Job) -> None:
        for sequence in job.sequences:
            self.pool.release(sequence.pages)
            sequence.reset()

    def _admit(self, copies) -> None:
        suspects = any(job.suspect for job in (*self.running, *self.waiting))
        while self.waiting and len(self.running) < (1 if suspects else self.settings.ar_max_num_seqs):
            job = self.waiting[0]
            if self._in_work(job) or not self._start(job, copies):
                break
            self.waiting.popleft()
            self.running.append(job)
            job.phase_start = time.perf_counter()

    def _in_work(self, job: Job) -> bool:
        """Whether the next image that a job needs is just being computed for another, which is worth waiting for."""
        if not self.settings.prefix_cache:
            return False
        first = job.sequences[0]
        _, length = self.cache.find(first.chain)
        wanted = next(
            (k for p, k in zip(first.segments, first.chain, strict=False) if p.kv_end > length and _is_image(p)), None
        )
        return wanted is not None and any(
            key == wanted and placed.kv_end > s.computed
            for other in self.running
            for s in other.sequences
            for placed, key in zip(s.segments, s.chain, strict=False)
        )

    def _start(self, job: Job, copies) -> bool:
        """Finds what is there of a job's contexts and allocates the rest; False if that is too much."""
        started: list[tuple[int, int]] = []
        cached = 0
        for sequence in job.sequences:
            pages, length = self.cache.find(sequence.chain) if self.settings.prefix_cache else ([], 0)
            if length <= sequence.shared:
                pages, length = [], 0
            sequence.forked = sequence.source is None or length > 0
            there = sequence.shared if not sequence.forked else length
            whole = there // self.settings.page_size
            held = pages[: whole + 1]
            self.pool.share(held)  # so that making room does not take them
            fresh = self._allocate(self._pages(sequence.target) - whole)
            if fresh is None:
                self.pool.release(held)
                for done in job.sequences:
                    self.pool.release(done.pages)
                    done.reset()
                return False
            if sequence.forked:
                sequence.pages, sequence.computed = [*pages[:whole], *fresh], length
                if len(held) > whole:
                    started.append((held[whole], fresh[0]))
                    self.pool.release(held[whole:])
            else:  # the shared pages come before these once the source has computed them
                sequence.pages = fresh
            cached += length
        copies += started
        job.stats.cached_tokens += cached
        return True

    def _fork(self, sequence: Sequence, copies) -> bool:
        """Takes over what a sequence shares with its source, once that has computed it; False: not yet."""
        if sequence.forked:
            return True
        source, shared = sequence.source, sequence.shared
        if source.computed < shared:
            return False
        whole, part = divmod(shared, self.settings.page_size)
        if part:
            copies.append((source.pages[whole], sequence.pages[0]))
        self.pool.share(source.pages[:whole])
        sequence.pages = [*source.pages[:whole], *sequence.pages]
        sequence.computed, sequence.forked = shared, True
        return True

    def _length_after(self, job: Job, tokens: int) -> int:
        """Length of a row's sequence when it has decoded `tokens` more, or as many as it may."""
        sequence = job.sequences[0]
        return sequence.computed + min(tokens, job.decoding.limit - len(sequence.tail) + 1)

    def _room_for_tokens(self, rows: list[Job], tokens: int) -> bool:
        wanted = (self._pages(self._length_after(job, tokens)) - len(job.sequences[0].pages) for job in rows)
        return self.cache.make_room(sum(max(0, count) for count in wanted))

    def _allocate_tokens(self, rows: list[Job], tokens: int) -> None:
        """Pages for the next tokens of all rows; who came last gives way where there are not enough."""
        for job in rows:
            while job in self.running and not self.grow(job.sequences[0], self._length_after(job, tokens)):
                self.preempt(self.running[-1])

    def preempt(self, job: Job) -> None:
        """Takes a job's pages away; it starts again as soon as there are pages for it."""
        self.release(job)
        self.waiting.appendleft(job)
        job.stats.preemptions += 1
        job.end_phase("preempted")

    def start_over(self, ready: Iterable[Job]) -> None:
        """Everything that was computed is lost, that of finished jobs too: all wait again, in order of arrival."""
        jobs = [*ready, *self.running, *self.waiting]
        self.cache.clear()
        for job in jobs:
            self._release_pages(job)
        self.running.clear()
        self.waiting = deque(sorted(jobs, key=lambda job: job.stats.submitted))

    def _prefill(self, budget: int, copies) -> tuple[list[Piece], Image | None]:
        whole_budget = budget
        pieces: list[Piece] = []
        image: Image | None = None
        spare = TEXT_BESIDE_IMAGE
        for job in self.running:
            for sequence in job.sequences:
                if budget <= 0 or len(pieces) == MAX_TEXTS:
                    return pieces, image
                if not sequence.missing or not self._fork(sequence, copies):
                    continue
                piece = Piece(job, sequence)
                for placed in sequence.remaining():
                    size = placed.segment.num_tokens
                    if isinstance(placed.segment, Text):
                        start = max(0, sequence.computed + _planned(piece, image) - placed.kv_start)
                        count = min(size - start, budget, spare if image is not None else budget)
                        piece.tokens += [
                            (placed.segment.ids[i], placed.kv_start + i, placed.rope + i, placed.kv_start + i + 1)
                            for i in range(start, start + count)
                        ]
                        budget, spare = budget - count, spare - count
                        if start + count < size:
                            break
                    else:
                        fits = size <= budget or budget == whole_budget
                        if image is not None or not fits or spare < 2:
                            break
                        image = Image(job, sequence, placed.segment, placed.kv_start + 1, placed.kv_end, placed.rope)
                        ends = (placed.kv_start, placed.kv_end - 1)
                        piece.tokens += [
                            (marker, place, placed.rope, placed.kv_end)
                            for marker, place in zip(self._markers, ends, strict=True)
                        ]
                        budget, spare = budget - size, spare - 2
                if piece.tokens:
                    pieces.append(piece)
        return pieces, image


def _is_image(placed) -> bool:
    return not isinstance(placed.segment, Text)


def _planned(piece: Piece, image: Image | None) -> int:
    """Tokens of a piece's sequence that the step computes so far."""
    inside = image.segment.num_tokens - 2 if image is not None and image.sequence is piece.sequence else 0
    return len(piece.tokens) + inside
