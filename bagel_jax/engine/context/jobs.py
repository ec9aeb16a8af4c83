"""What stage 0 knows of a request: the sequences of tokens that it has to build, and how far they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bagel_jax.engine.kv.prefix_cache import Hasher
from bagel_jax.engine.ticket import Ticket
from bagel_jax.layout import KVPrefix, PlacedSegment, Position, Text, behind, place


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
    def behind(self) -> Position:
        """Where the first token behind the segments stands."""
        return behind(self.segments)

    @property
    def length(self) -> int:
        """Tokens of the segments."""
        return self.behind.place

    @property
    def fed(self) -> int:
        """Decoded tokens that have been fed, or are to be prefilled again."""
        return max(0, len(self.tail) - 1)

    @property
    def next(self) -> Position:
        """Where the next token that decoding feeds stands."""
        return self.behind.after_text(self.fed)

    @property
    def target(self) -> int:
        """Tokens that must be computed before it can decode, or is a finished context."""
        return self.next.place

    @property
    def missing(self) -> int:
        """Tokens still to be prefilled."""
        return max(0, self.target - self.computed)

    def remaining(self) -> Iterator[PlacedSegment]:
        """The segments not wholly computed, in order; decoded tokens that must be computed again are one more."""
        for placed in self.segments:
            if placed.kv_end > self.computed:
                yield placed
        if self.fed:
            yield from place([Text(tuple(self.tail[:-1]))], self.behind)

    def append(self, segment: Text) -> None:
        """The decoded tokens make way for a segment."""
        self.computed, self.tail = self.length, []
        self.segments += place([segment], self.behind)

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

    @classmethod
    def of(cls, request) -> Decoding | None:
        """A request's; None if it decodes nothing."""
        if request.makes_image and not request.think:
            return None
        s = request.settings
        return cls(
            limit=s.max_think_tokens if request.makes_image else s.max_tokens,
            key=(0, request.seed),  # as `jax.random.key` makes it of 32 bits, without asking the device
            do_sample=s.do_sample,
            temperature=s.text_temperature,
            top_k=s.top_k,
            top_p=s.top_p,
        )


@dataclass(eq=False)
class ContextJob:
    """A request in stage 0. Sequence 0 is the full context, and the one that decodes."""

    ticket: Ticket
    sequences: list[Sequence]
    decoding: Decoding | None
    ids: list[int] | None = None  # decoded, once decoding is over

    @classmethod
    def create(cls, ticket: Ticket, im_start: int) -> ContextJob:
        """The job of a request; decoding begins with `im_start`."""
        hasher = Hasher(ticket.prepared)
        sequences: list[Sequence] = []
        whole: list[list[PlacedSegment]] = []  # with what is shared
        for one in ticket.prepared.plan.sequences:
            source = None if one.copy_from is None else sequences[one.copy_from]
            before = [p for p in whole[one.copy_from] if p.kv_end <= one.shared] if source else []
            whole.append([*before, *one.compute])
            chain = hasher.chain(p.segment for p in whole[-1])
            sequences.append(Sequence(whole[-1], chain, source, one.shared))
        job = cls(ticket, sequences, Decoding.of(ticket.prepared.request))
        if job.decoding is not None:
            job.sequences[0].tail = [im_start]
        return job

    @property
    def prefixes(self) -> tuple[KVPrefix, KVPrefix, KVPrefix]:
        """What the three branches see; a plan in words that was decoded is part of the full context alone."""
        plan = self.ticket.prepared.plan
        return KVPrefix(0, *self.sequences[0].behind), plan.drop_text, plan.drop_image

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
