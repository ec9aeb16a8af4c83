"""From a planned step to the arrays of its program, padded to few sizes.

With rows that decode there are as many as may be in work, or a power of two where nothing is prefilled; a text is
padded to a power of two; beside an image's block there is one size of text, and the block is padded by an eighth at
most. So a steady load needs a handful of programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from bagel_jax.buckets import power_of_two
from bagel_jax.engine.context.jobs import Job
from bagel_jax.engine.context.scheduler import MAX_TEXTS, TEXT_BESIDE_IMAGE, StepPlan
from bagel_jax.engine.context.steps import Chunk, Rows
from bagel_jax.sampling.tokens import Sampling

_LEAST_TEXT = 16
_COPIES = 8


def _table(pages: Sequence[Sequence[int]], size: int, width: int) -> np.ndarray:
    table = np.zeros((size, width), np.int32)
    for row, own in zip(table, pages, strict=False):
        row[: len(own)] = own
    return table


def rows_of(jobs: Sequence[Job], size: int, width: int) -> tuple[Rows, Sampling]:
    """The next token of each job, in `size` rows with `width` pages."""

    def column(values, dtype=np.int32, padding=0):
        return np.asarray([*values, *[padding] * (size - len(jobs))], dtype)

    sequences = [job.sequences[0] for job in jobs]
    how = [job.decoding for job in jobs]
    rows = Rows(
        token=column(s.tail[-1] for s in sequences),
        place=column(s.computed for s in sequences),
        rope=column(s.rope + len(s.tail) - 1 for s in sequences),
        count=column(len(s.tail) - 1 for s in sequences),
        limit=column(d.limit for d in how),
        done=column((False for _ in jobs), bool, True),
        page_table=_table([s.pages for s in sequences], size, width),
    )
    sampling = Sampling(
        key=np.asarray([*(d.key for d in how), *[(0, 0)] * (size - len(jobs))], np.uint32).reshape(size, 2),
        do_sample=column((d.do_sample for d in how), bool, False),
        temperature=column((d.temperature for d in how), np.float32, 1),
        top_k=column(d.top_k for d in how),
        top_p=column((d.top_p for d in how), np.float32, 1),
    )
    return rows, sampling


def chunk_of(plan: StepPlan, image, page_size: int, width: int) -> Chunk:
    """What a step prefills; `image` is the image's embedded block `[N, D]`, padded, or None."""
    tokens = np.asarray([token for piece in plan.pieces for token in piece.tokens], np.int32).reshape(-1, 4)
    count = len(tokens)
    size = TEXT_BESIDE_IMAGE if plan.image is not None else power_of_two(count, _LEAST_TEXT)
    extra = 0 if image is None else image.shape[0]

    ids = np.zeros(size, np.int32)
    place, rope, kv_end, page, slot = np.zeros((5, size + extra), np.int32)
    ids[:count], place[:count], rope[:count], kv_end[:count] = tokens.T
    ends = np.cumsum([0, *(len(piece.tokens) for piece in plan.pieces)])
    owners = [piece.sequence.pages for piece in plan.pieces]
    for start, end, pages in zip(ends[:-1], ends[1:], owners, strict=True):
        page[start:end] = np.asarray(pages, np.int32)[place[start:end] // page_size]
    slot[:count] = place[:count] % page_size

    table = _table(owners, MAX_TEXTS + 2, width)
    if plan.image is not None:
        real = slice(size, size + plan.image.segment.num_tokens - 2)
        places = plan.image.kv_start + np.arange(real.stop - real.start)
        own = np.asarray(plan.image.sequence.pages, np.int32)
        page[real], slot[real] = own[places // page_size], places % page_size
        rope[real], kv_end[real] = plan.image.rope, plan.image.kv_end
        table[-1, : len(own)] = own
    # The texts, then padding as a sequence of its own, then the image.
    offsets = np.asarray([*ends, *[count] * (MAX_TEXTS - len(plan.pieces)), size, size + extra], np.int32)
    return Chunk(ids, image, rope, page, slot, kv_end, offsets, table)


def copies_of(copies: Sequence[tuple[int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pages to copy one after another, source and target, in groups of one size, padded with page 0 onto itself.

    All pages of a group are read before any is written, so a page that was just written begins a new group.
    """
    groups: list[list[tuple[int, int]]] = []
    written: set[int] = set()
    for source, target in copies:
        if not groups or len(groups[-1]) == _COPIES or {source, target} & written:
            groups.append([])
            written.clear()
        groups[-1].append((source, target))
        written.add(target)
    for group in groups:
        padded = np.zeros((_COPIES, 2), np.int32)
        padded[: len(group)] = group
        yield padded[:, 0], padded[:, 1]
