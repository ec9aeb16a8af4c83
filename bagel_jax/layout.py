"""The rules of BAGEL's contexts: from segments to tokens, once, for serving and for training.

A context is a list of segments: texts, and blocks of images. A text is `<|im_start|> … <|im_end|>`; a block is an
image's tokens between `<|vision_start|>` and `<|vision_end|>`. An image that is edited is two blocks, that of the
autoencoder's latents (VAE) and then that of the ViT's patches.

**Experts.** Latents go through the generation expert; all else, the markers of their block included, through the
understanding one.

**RoPE.** A text advances the position by its length. All tokens of a block have one position, and it advances by one.

**Mask.** One integer a token: it sees the places `[0, kv_end)` of its context. Drawn for a text of two tokens, a block
of one latent between its markers, and a text again:

         t t  [ z ]  t      place  kv_end  RoPE  expert
    t    1 0  0 0 0  0        0      1      0    understanding
    t    1 1  0 0 0  0        1      2      1    understanding
    [    1 1  1 1 1  0        2      5      2    understanding
    z    1 1  1 1 1  0        3      5      2    generation
    ]    1 1  1 1 1  0        4      5      2    understanding
    t    1 1  1 1 1  1        5      6      3    understanding

**Noised blocks.** A block of latents that is denoised (or learned) is seen by nobody but itself, and the RoPE
position does not advance behind it. In serving it is always the last; in training more may follow, so the mask of
packed samples says of each token which noised block it belongs to:

         t  [ ~ ]  t
    t    1  0 0 0  0
    [    1  1 1 1  0
    ~    1  1 1 1  0       kv_end 4, noised block 1
    ]    1  1 1 1  0
    t    1  0 0 0  1       kv_end 5, but for the noised block

**Guidance** compares three contexts: `cond`, the full one; `drop_text`, without the last text; `drop_image`, without
images.

Source: `prepare_prompts`, `prepare_vit_images`, `prepare_vae_images`, `prepare_vae_latent` in the official
`modeling/bagel/bagel.py`, `interleave_inference` in `inferencer.py`, `pack_sequence` in `data/dataset_base.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# What a token is, which says what embeds it.
TEXT, VIT, VAE = 0, 1, 2
# The two experts.
UNDERSTANDING, GENERATION = 0, 1
NUM_MARKERS = 2  # of a block


class SpecialTokens(NamedTuple):
    """Token ids of the markers."""

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int

    @property
    def markers(self) -> tuple[int, int]:
        """The two around a block."""
        return self.vision_start, self.vision_end

    def text(self, ids: Sequence[int]) -> Text:
        """The segment of a text's own tokens."""
        return Text((self.im_start, *ids, self.im_end))


@dataclass(frozen=True)
class Text:
    """A text with its two marker tokens; causal."""

    ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Places it takes."""
        return len(self.ids)

    @property
    def rope_advance(self) -> int:
        """How far the RoPE position moves on."""
        return len(self.ids)


@dataclass(frozen=True)
class _Block:
    """A block of an image; bidirectional."""

    image: int  # which input image
    rows: int
    columns: int

    kind = VIT
    noised = False

    @property
    def num_inside(self) -> int:
        """Tokens between the markers."""
        return self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        """Places it takes, the two markers included."""
        return self.num_inside + NUM_MARKERS

    @property
    def rope_advance(self) -> int:
        """How far the RoPE position moves on: the whole block has one."""
        return 0 if self.noised else 1


@dataclass(frozen=True)
class VitImage(_Block):
    """An image's ViT patches between markers."""


@dataclass(frozen=True)
class VaeImage(_Block):
    """An image's latent tokens between markers; `noised`: those that are denoised or learned."""

    noised: bool = False

    kind = VAE


@dataclass(frozen=True)
class Gap:
    """A condition left out in training: an image left out still moves the RoPE position on, as in the official code."""

    rope_advance: int
    num_tokens: int = 0


Segment = Text | VitImage | VaeImage | Gap
Context = tuple[Segment, ...]


class Position(NamedTuple):
    """Where the next token of a context stands; integers, or arrays of any library."""

    place: Any = 0
    rope: Any = 0

    def after(self, segment: Segment) -> Position:
        """The position behind a segment."""
        return Position(self.place + segment.num_tokens, self.rope + segment.rope_advance)

    def after_text(self, count: Any) -> Position:
        """The position behind `count` tokens of a text."""
        return Position(self.place + count, self.rope + count)


def text_kv_end(place: Any) -> Any:
    """`kv_end` of a text's token at `place`; integers or arrays."""
    return place + 1


def block_kv_end(start: Any, num_inside: Any) -> Any:
    """`kv_end` of every token of a block that begins at `start` with so many tokens between its markers."""
    return start + num_inside + NUM_MARKERS


@dataclass(frozen=True)
class PlacedSegment:
    """A segment in its context."""

    segment: Segment
    kv_start: int
    rope: int  # RoPE position of its first token

    @property
    def kv_end(self) -> int:
        """One past its last token."""
        return self.behind.place

    @property
    def behind(self) -> Position:
        """Where the next segment stands."""
        return Position(self.kv_start, self.rope).after(self.segment)


def place(segments: Sequence[Segment], start: Position = Position()) -> tuple[PlacedSegment, ...]:  # noqa: B008
    """Where each segment of a context lies, the first one at `start`."""
    placed = []
    for segment in segments:
        placed.append(PlacedSegment(segment, *start))
        start = start.after(segment)
    return tuple(placed)


def behind(placed: Sequence[PlacedSegment]) -> Position:
    """Where the next segment of a context stands."""
    return placed[-1].behind if placed else Position()


class Tokens(NamedTuple):
    """Tokens of a context in order of their places, each field `[T]` int32."""

    id: np.ndarray  # -1 for what is no text or marker: a patch or a latent
    kind: np.ndarray  # TEXT (markers too), VIT or VAE
    rope: np.ndarray
    place: np.ndarray
    kv_end: np.ndarray
    block: np.ndarray  # number of the block in its context, from 1; 0: none
    noised: np.ndarray  # the same if the block is noised; else 0

    @property
    def expert(self) -> np.ndarray:
        """UNDERSTANDING or GENERATION."""
        return np.where(self.kind == VAE, GENERATION, UNDERSTANDING)

    def of(self, index: Any) -> Tokens:
        """Some of the tokens: `index` is a mask or a slice."""
        return Tokens(*(column[index] for column in self))


def tokens(placed: Sequence[PlacedSegment], markers: tuple[int, int]) -> Tokens:
    """All tokens of placed segments; `markers` are the ids of `<|vision_start|>` and `<|vision_end|>`."""
    parts: list[Tokens] = []
    block = 0
    for one in placed:
        segment, count = one.segment, one.segment.num_tokens
        if isinstance(segment, Gap):
            continue
        number = np.arange(count, dtype=np.int32)
        at = Position(np.full(count, one.kv_start, np.int32), np.full(count, one.rope, np.int32))
        zero = np.zeros(count, np.int32)
        if isinstance(segment, Text):
            at = at.after_text(number)
            ids = np.asarray(segment.ids, np.int32)
            parts.append(Tokens(ids, zero + TEXT, at.rope, at.place, text_kv_end(at.place), zero, zero))
            continue
        block += 1
        ids, kind = zero - 1, zero + segment.kind
        ids[[0, -1]], kind[[0, -1]] = markers, TEXT
        end = zero + block_kv_end(one.kv_start, segment.num_inside)
        noised = zero + (block if segment.noised else 0)
        parts.append(Tokens(ids, kind, at.rope, at.place + number, end, zero + block, noised))
    empty = Tokens(*(np.zeros(0, np.int32) for _ in Tokens._fields))
    return Tokens(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))


class PackedMask(NamedTuple):
    """Who sees whom among the tokens of several contexts packed in any order, each `[..., T]` int32 (training).

    A token sees those of its own sample at places before its `kv_end`, but for those of a noised block, which only that
    block's own tokens see. Padding is sample 0.
    """

    segment_ids: Any  # the sample
    position: Any  # the token's place in its sample
    kv_end: Any
    noised_id: Any  # number of the noised block that it belongs to; 0: none

    def seen(self, keys: PackedMask) -> Any:
        """`[T, T']` bool: whether each of these tokens sees each of the `keys`."""
        query = PackedMask(*(column[:, None] for column in self))
        key = PackedMask(*(column[None] for column in keys))
        hidden = (key.noised_id != 0) & (key.noised_id != query.noised_id)
        return (query.segment_ids == key.segment_ids) & (key.position < query.kv_end) & ~hidden


@dataclass(frozen=True)
class ImageGrids:
    """An input image's place in the prompt: the grids that its blocks have."""

    image: int
    vit: tuple[int, int]  # rows, columns
    vae: tuple[int, int] | None  # None where images are only understood


@dataclass(frozen=True)
class Contexts:
    """The three contexts of a request."""

    cond: Context
    drop_text: Context  # without the last text
    drop_image: Context  # without images


def contexts(
    inputs: Sequence[Text | ImageGrids], *, system: Text | None = None, negative: Text | None = None
) -> Contexts:
    """The three contexts.

    Args:
        inputs: texts and images in the order of the prompt.
        system: a system prompt (think mode), before everything.
        negative: a negative prompt; stands in the second context where the last text is missing.
    """
    cond: Context = () if system is None else (system,)
    drop_text: Context = ()
    drop_image = cond
    for item in inputs:
        if isinstance(item, Text):
            drop_text = cond
            cond, drop_image = (*cond, item), (*drop_image, item)
        else:
            if item.vae is not None:
                cond = (*cond, VaeImage(item.image, *item.vae))
            cond = (*cond, VitImage(item.image, *item.vit))
            drop_text = cond
    return Contexts(cond, drop_text if negative is None else (*drop_text, negative), drop_image)


@dataclass(frozen=True)
class KVPrefix:
    """What a guidance branch sees: the first `length` tokens of a sequence."""

    sequence: int
    length: int
    rope: int  # the next RoPE position


@dataclass(frozen=True)
class SequencePlan:
    """How the KV of one sequence comes to be: `shared` tokens of another one, then segments to compute."""

    copy_from: int | None
    shared: int
    compute: tuple[PlacedSegment, ...]


@dataclass(frozen=True)
class KVPlan:
    """Sequences to compute, in order, and what each guidance branch sees of them. Sequence 0 is the full context."""

    sequences: tuple[SequencePlan, ...]
    cond: KVPrefix
    drop_text: KVPrefix
    drop_image: KVPrefix


def plan(wanted: Contexts) -> KVPlan:
    """The sequences that three contexts need, each computing only what no earlier one holds.

    `drop_text` is a prefix of `cond` and often so is `drop_image`, so they are prefixes of one sequence wherever that
    is possible.
    """
    kept: list[Context] = [wanted.cond]
    sequences = [SequencePlan(None, 0, place(wanted.cond))]
    prefixes = []
    for context in (wanted.cond, wanted.drop_text, wanted.drop_image):
        common = [_common_prefix(context, other) for other in kept]
        sequence = max(range(len(kept)), key=common.__getitem__)
        shared = common[sequence]
        placed = place(context)
        if shared < len(context):
            kv_shared = placed[shared].kv_start
            sequences.append(SequencePlan(sequence if kv_shared else None, kv_shared, placed[shared:]))
            kept.append(context)
            sequence = len(kept) - 1
        prefixes.append(KVPrefix(sequence, *behind(placed)))
    return KVPlan(tuple(sequences), *prefixes)


def _common_prefix(a: Context, b: Context) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count
