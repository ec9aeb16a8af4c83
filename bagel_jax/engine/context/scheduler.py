"""Which tokens of which requests the next step computes. On the host; no array of the device is touched."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from bagel_jax.engine.context.jobs import ContextJob, Sequence
from bagel_jax.engine.kv.store import KVStore
from bagel_jax.layout import NUM_MARKERS, TEXT, Text, Tokens, VaeImage, VitImage, tokens
from bagel_jax.settings import EngineConfig

# Texts beside an image's block, and sequences with text to prefill, in one step: few, so that there are few programs.
TEXT_BESIDE_IMAGE = 64
MAX_TEXTS = 8


@dataclass
class TextChunk:
    """Text tokens of one sequence in a step, the markers of an image's block among them."""

    job: ContextJob
    sequence: Sequence
    parts: list[Tokens]

    @property
    def count(self) -> int:
        """Number of its tokens."""
        return sum(len(part.id) for part in self.parts)


@dataclass
class ImageChunk:
    """An image's block in a step: what stands between its markers."""

    job: ContextJob
    sequence: Sequence
    segment: VitImage | VaeImage
    inside: Tokens


@dataclass
class StepPlan:
    """What one step computes."""

    rows: list[ContextJob]
    texts: list[TextChunk]
    image: ImageChunk | None
    copies: list[tuple[int, int]]  # pages to copy first: source, target
    tokens: int = 1  # that each row may decode; more than one only where nothing is prefilled

    @property
    def jobs(self) -> list[ContextJob]:
        """Whose tokens are computed."""
        return list(dict.fromkeys([*self.rows, *(chunk.job for chunk in self.texts)]))

    def count(self, chunk: TextChunk) -> int:
        """Tokens of a chunk's sequence that the step computes, those of an image included."""
        return _planned(chunk, self.image)


class Scheduler:
    """First come, first served; who came last gives way when pages run out, and is computed again later."""

    def __init__(self, store: KVStore, settings: EngineConfig, markers: tuple[int, int]):
        self.store, self.pool, self.settings, self._markers = store, store.pool, settings, markers
        self.cache = store.prefixes
        self.waiting: deque[ContextJob] = deque()
        self.running: list[ContextJob] = []  # in order of arrival

    def plan(self, tokens: int, now: float) -> StepPlan:
        """The next step, in which rows may decode as many as `tokens` tokens if there is nothing else to do."""
        copies: list[tuple[int, int]] = []
        self._admit(copies, now)
        rows = [job for job in self.running if job.decodes]
        first = any(len(job.sequences[0].tail) == 1 for job in rows)  # somebody waits for a first token
        if first or len(rows) < len(self.running) or not self._room_for_tokens(rows, tokens):
            tokens = 1
        self._allocate_tokens(rows, tokens, now)
        rows = [job for job in rows if job in self.running]
        texts, image = self._prefill(self.settings.max_num_batched_tokens - len(rows), copies)
        return StepPlan(rows, texts, image, copies, tokens)

    def follow(self, last: StepPlan, tokens: int) -> StepPlan | None:
        """The step behind one whose results are not known yet; None where it depends on them.

        The same rows decode on; those that have ended by then do nothing. Nobody's pages are taken, and nobody is kept
        waiting who could be let in.
        """
        full = len(self.running) >= self.settings.ar_max_num_seqs
        live = [job for job in last.rows if job.decodes and job in self.running]
        if last.texts or not live or len(live) < len(self.running) or (self.waiting and not full):
            return None
        if any(not job.sequences[0].fed for job in live):
            return None  # on a GPU, dispatching waits for the steps of the call before: a first token should not
        ahead = last.tokens + tokens
        if all(self._length_after(job, ahead) == self._length_after(job, last.tokens) for job in live):
            return None  # all will have come to their limits
        if not self._room_for_tokens(live, ahead):
            return None
        for job in live:
            self.grow(job.sequences[0], self._length_after(job, ahead))
        return StepPlan(last.rows, [], None, [], tokens)

    def release(self, job: ContextJob) -> None:
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
            pages = self.store.allocate(wanted)
            if pages is None:
                return False
            sequence.pages += pages
        return True

    def pages_needed(self, job: ContextJob) -> int:
        """Pages that a job may need in all when it is alone."""
        main, *others = job.sequences
        longest = main.length + (job.decoding.limit if job.decoding is not None else 0)
        if job.decoding is not None and job.ticket.prepared.request.makes_image:
            longest += NUM_MARKERS  # of the plan, as a text
        count = self._pages(longest)
        for s in others:
            count += self._pages(s.length) - (s.shared // self.settings.page_size if s.source is main else 0)
        return count

    def _pages(self, tokens: int) -> int:
        return self.store.count(tokens)

    def _release_pages(self, job: ContextJob) -> None:
        for sequence in job.sequences:
            self.pool.release(sequence.pages)
            sequence.reset()

    def _give_up(self, job: ContextJob) -> None:
        """Takes away all that a job has here; it is to begin again."""
        self._release_pages(job)
        self.store.blocks.forgo(job.ticket)

    def _admit(self, copies, now: float) -> None:
        suspects = any(job.ticket.suspect for job in (*self.running, *self.waiting))
        while self.waiting and len(self.running) < (1 if suspects else self.settings.ar_max_num_seqs):
            job = self.waiting[0]
            if self._in_work(job):
                break
            # A prefix is held while its last page is copied, for which a request that is alone may lack the room.
            if not self._start(job, copies) and (self.running or not self._start(job, copies, anew=True)):
                break
            self.waiting.popleft()
            self.running.append(job)
            # Of contexts that were kept whole nothing is computed, and no call says that it has prefilled them: a text
            # that took no time to decode would have endless tokens a second.
            job.ticket.enter("prefill" if not job.prefilled else "wait" if job.decoding is None else "decode", now)

    def _in_work(self, job: ContextJob) -> bool:
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

    def _start(self, job: ContextJob, copies, *, anew: bool = False) -> bool:
        """Finds what is there of a job's contexts, unless `anew`, and allocates the rest; False if that is too much."""
        started: list[tuple[int, int]] = []
        cached = 0
        self.store.blocks.promise(job.ticket, job.ticket.blocks)
        for sequence in job.sequences:
            pages, length = [], 0
            if self.settings.prefix_cache and not anew:
                pages, length = self.cache.find(sequence.chain)
            if length <= sequence.shared:
                pages, length = [], 0
            sequence.forked = sequence.source is None or length > 0
            there = sequence.shared if not sequence.forked else length
            whole = there // self.settings.page_size
            held = pages[: whole + 1]
            self.pool.share(held)  # so that making room does not take them
            fresh = self.store.allocate(self._pages(sequence.target) - whole)
            if fresh is None:
                self.pool.release(held)
                self._give_up(job)
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
        job.ticket.result.cached_prefix_tokens += cached
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

    def _length_after(self, job: ContextJob, tokens: int) -> int:
        """Length of a row's sequence when it has decoded `tokens` more, or as many as it may."""
        sequence = job.sequences[0]
        return sequence.computed + min(tokens, job.decoding.limit - len(sequence.tail) + 1)

    def _room_for_tokens(self, rows: list[ContextJob], tokens: int) -> bool:
        wanted = (self._pages(self._length_after(job, tokens)) - len(job.sequences[0].pages) for job in rows)
        return self.store.make_room(sum(max(0, count) for count in wanted))

    def _allocate_tokens(self, rows: list[ContextJob], tokens: int, now: float) -> None:
        """Pages for the next tokens of all rows; who came last gives way where there are not enough."""
        for job in rows:
            while job in self.running and not self.grow(job.sequences[0], self._length_after(job, tokens)):
                self.preempt(self.running[-1], now)

    def preempt(self, job: ContextJob, now: float) -> None:
        """Takes a job's pages away; it starts again as soon as there are pages for it."""
        self.running.remove(job)
        self._give_up(job)
        self.waiting.appendleft(job)
        job.ticket.enter("preempted", now)

    def start_over(self, jobs: Iterable[ContextJob]) -> None:
        """Everything that was computed is lost: all wait again, in order of arrival, and those of other `jobs` too."""
        everybody = [*jobs, *self.running, *self.waiting]
        for job in everybody:
            self._give_up(job)
        self.running.clear()
        self.waiting.clear()
        self.wait_again(everybody)

    def wait_again(self, jobs: Iterable[ContextJob]) -> None:
        """Jobs that have left begin again; all wait in order of arrival."""
        self.waiting = deque(sorted([*self.waiting, *jobs], key=lambda job: job.ticket.number))

    def _prefill(self, budget: int, copies) -> tuple[list[TextChunk], ImageChunk | None]:
        whole_budget = budget
        texts: list[TextChunk] = []
        image: ImageChunk | None = None
        spare = TEXT_BESIDE_IMAGE
        for job in self.running:
            for sequence in job.sequences:
                if budget <= 0 or len(texts) == MAX_TEXTS:
                    return texts, image
                if not sequence.missing or not self._fork(sequence, copies):
                    continue
                chunk = TextChunk(job, sequence, [])
                for placed in sequence.remaining():
                    laid = tokens([placed], self._markers)
                    size = len(laid.id)
                    if isinstance(placed.segment, Text):
                        start = max(0, sequence.computed + _planned(chunk, image) - placed.kv_start)
                        # An image larger than the budget leaves less than none, and a slice would count from its end.
                        count = max(0, min(size - start, budget, spare if image is not None else budget))
                        chunk.parts.append(laid.of(slice(start, start + count)))
                        budget, spare = budget - count, spare - count
                        if start + count < size:
                            break
                    else:
                        fits = size <= budget or budget == whole_budget
                        if image is not None or not fits or spare < NUM_MARKERS:
                            break
                        marks = laid.kind == TEXT
                        image = ImageChunk(job, sequence, placed.segment, laid.of(~marks))
                        chunk.parts.append(laid.of(marks))
                        budget, spare = budget - size, spare - NUM_MARKERS
                if chunk.count:
                    texts.append(chunk)
        return texts, image


def _is_image(placed) -> bool:
    return not isinstance(placed.segment, Text)


def _planned(chunk: TextChunk, image: ImageChunk | None) -> int:
    """Tokens of a chunk's sequence that the step computes so far."""
    inside = image.segment.num_inside if image is not None and image.sequence is chunk.sequence else 0
    return chunk.count + inside
