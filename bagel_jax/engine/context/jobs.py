"""What stage 0 knows of a request: the sequences of tokens that it has to build, and how far they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from bagel_jax.clock import Span
from bagel_jax.engine.kv.prefix_cache import Hasher
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.layout import KVPrefix, PlacedSegment, Text


@dataclass(eq=False)
class Sequence:
    """One context of a request and its pages. Its first `computed` tokens have their keys and values there."""

    segments: list[PlacedSegment]
    chain: list[bytes]  # hashes of the prefixes that end with each segment
    source: Sequence | None = None  # shares its first `shared` tokens
    shared: int = 0
    # Tokens decoded behind the segments. The last one is still to be fed.
    tail: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    forked: bool = False  # whether what is shared is there (or there is nothing to share)

    @property
    def length(self) -> int:
        """Tokens of the segments."""
        return self.segments[-1].kv_end if self.segments else 0

    @property
    def rope(self) -> int:
        """RoPE position behind the segments."""
        return self.segments[-1].rope + self.segments[-1].segment.rope_advance if self.segments else 0

    @property
    def target(self) -> int:
        """Tokens that must be computed before it can decode, or is a finished context."""
        return self.length + max(0, len(self.tail) - 1)

    @property
    def missing(self) -> int:
        """Tokens still to be prefilled."""
        return max(0, self.target - self.computed)

    def remaining(self) -> Iterator[PlacedSegment]:
        """The segments not wholly computed, in order; decoded tokens that must be computed again are one more."""
        for placed in self.segments:
            if placed.kv_end > self.computed:
                yield placed
        if len(self.tail) > 1:
            yield PlacedSegment(Text(tuple(self.tail[:-1])), self.length, self.rope)

    def reset(self) -> None:
        """Forgets what was computed; the pages must have been released."""
        self.pages, self.computed, self.forked = [], 0, False


@dataclass
class Decoding:
    """How a request decodes."""

    limit: int  # tokens that may be fed
    key: tuple[int, int]  # threefry key, two words
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float


@dataclass
class Statistics:
    """What a request cost in stage 0; times are in seconds."""

    submitted: float
    prefilled_tokens: int = 0
    cached_tokens: int = 0  # found in the prefix cache
    decoded_tokens: int = 0
    preemptions: int = 0
    time_to_first_token: float | None = None
    spans: list[Span] = field(default_factory=list)


@dataclass(eq=False)
class Job:
    """A request in stage 0. Sequence 0 is the full context, and the one that decodes."""

    prepared: Prepared
    sequences: list[Sequence]
    main: KVPrefix
    decoding: Decoding | None
    stats: Statistics
    ids: list[int] | None = None  # decoded, once decoding is over
    phase_start: float = 0.0
    suspect: bool = False  # was in work when the device failed, so it goes on alone

    @classmethod
    def create(cls, prepared: Prepared, decoding: Decoding | None, im_start: int) -> Job:
        """The job of a prepared request."""
        hasher = Hasher(prepared)
        sequences: list[Sequence] = []
        whole: list[list[PlacedSegment]] = []  # with what is shared
        for build in prepared.plan.sequences:
            source = None if build.copy_from is None else sequences[build.copy_from]
            before = [p for p in whole[build.copy_from] if p.kv_end <= build.shared] if source else []
            whole.append([*before, *build.compute])
            chain = hasher.chain(p.segment for p in whole[-1])
            sequences.append(Sequence(whole[-1], chain, source, build.shared))
        job = cls(prepared, sequences, prepared.plan.cond, decoding, Statistics(time.perf_counter()))
        if decoding is not None:
            job.sequences[0].tail = [im_start]
        return job

    @property
    def request_id(self) -> str:
        """The request's."""
        return self.prepared.request.request_id

    @property
    def decodes(self) -> bool:
        """Whether all that it waits for is its next token."""
        return self.decoding is not None and not self.sequences[0].missing

    @property
    def prefilled(self) -> bool:
        """Whether all contexts are there."""
        return not any(s.missing for s in self.sequences)

    @property
    def finished(self) -> bool:
        """Whether all contexts are there and nothing is to be decoded."""
        return self.decoding is None and self.prefilled

    def end_phase(self, name: str) -> None:
        """Notes that a phase has ended now and the next one begins."""
        now = time.perf_counter()
        self.stats.spans.append(Span.here(name, self.phase_start, now))
        self.phase_start = now
