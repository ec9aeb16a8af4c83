"""The plan of a request: what its contexts hold and where everything lies. Pure; no array is touched.

A context is a list of segments. A text advances the RoPE position by its length; a block of an image has one
position for all its tokens and advances it by one. Guidance needs three contexts (official `inferencer.py`,
`interleave_inference`): the full one; one without the last text; one without images. The second is a prefix of
the first and often so is the third, so they are views of one cache wherever that is possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A text with its two marker tokens; causal, understanding expert."""

    ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in the cache."""
        return len(self.ids)

    @property
    def rope_advance(self) -> int:
        """How far the RoPE position moves on."""
        return len(self.ids)


@dataclass(frozen=True)
class _Block:
    image: int  # which input image
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the cache, the two markers included."""
        return self.rows * self.columns + 2

    @property
    def rope_advance(self) -> int:
        """How far the RoPE position moves on: the whole block has one position."""
        return 1


class VitImage(_Block):
    """An image's ViT patches between markers; bidirectional, understanding expert."""


class VaeImage(_Block):
    """An image's latent tokens (generation expert) between markers (understanding expert); bidirectional."""


Segment = Text | VitImage | VaeImage
Context = tuple[Segment, ...]


@dataclass(frozen=True)
class ImageGrids:
    """An input image's place in the prompt: the grids that its blocks have."""

    image: int
    vit: tuple[int, int]  # rows, columns
    vae: tuple[int, int] | None  # None where images are only understood


@dataclass(frozen=True)
class Contexts:
    """The three contexts of a request."""

    main: Context
    text: Context  # without the last text
    img: Context  # without images


@dataclass(frozen=True)
class Placed:
    """A segment in a cache."""

    segment: Segment
    kv_start: int
    rope: int  # RoPE position of its first token

    @property
    def kv_end(self) -> int:
        """One past its last token."""
        return self.kv_start + self.segment.num_tokens


@dataclass(frozen=True)
class View:
    """What a guidance branch sees: the first `length` tokens of a cache."""

    cache: int
    length: int
    rope: int  # the next RoPE position


@dataclass(frozen=True)
class Build:
    """How one cache comes to be: `shared` tokens copied from another cache, then segments to compute."""

    copy_from: int | None
    shared: int
    compute: tuple[Placed, ...]


@dataclass(frozen=True)
class Plan:
    """Caches to build, in order, and the view of each guidance branch. Cache 0 is the full context."""

    builds: tuple[Build, ...]
    main: View
    text: View
    img: View


def contexts(
    inputs: Sequence[Text | ImageGrids], *, system: Text | None = None, negative: Text | None = None
) -> Contexts:
    """The three contexts.

    Args:
        inputs: texts and images in the order of the prompt.
        system: a system prompt (think mode), before everything.
        negative: a negative prompt; stands in the second context where the last text is missing.
    """
    main: Context = () if system is None else (system,)
    text: Context = ()
    img = main
    for item in inputs:
        if isinstance(item, Text):
            text = main
            main, img = (*main, item), (*img, item)
        else:
            if item.vae is not None:
                main = (*main, VaeImage(item.image, *item.vae))
            main = (*main, VitImage(item.image, *item.vit))
            text = main
    return Contexts(main, text if negative is None else (*text, negative), img)


def place(segments: Context) -> tuple[Placed, ...]:
    """Where each segment of a context lies."""
    placed, start, rope = [], 0, 0
    for segment in segments:
        placed.append(Placed(segment, start, rope))
        start, rope = start + segment.num_tokens, rope + segment.rope_advance
    return tuple(placed)


def plan(wanted: Contexts) -> Plan:
    """The caches that three contexts need, each computing only what no earlier cache holds."""
    kept: list[Context] = [wanted.main]
    builds = [Build(None, 0, place(wanted.main))]
    views = []
    for context in (wanted.main, wanted.text, wanted.img):
        common = [_common_prefix(context, other) for other in kept]
        cache = max(range(len(kept)), key=common.__getitem__)
        shared = common[cache]
        placed = place(context)
        length = placed[-1].kv_end if placed else 0
        rope = placed[-1].rope + placed[-1].segment.rope_advance if placed else 0
        if shared < len(context):
            kv_shared = placed[shared].kv_start
            builds.append(Build(cache if kv_shared else None, kv_shared, placed[shared:]))
            kept.append(context)
            cache = len(kept) - 1
        views.append(View(cache, length, rope))
    return Plan(tuple(builds), *views)


def _common_prefix(a: Context, b: Context) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count
