"""From a planned step to the arrays of its program, padded to few sizes.

With rows that decode there are as many as may be in work, or a power of two where nothing is prefilled; a text is
padded to a power of two; beside an image's block there is one size of text, and the block is padded by an eighth at
most. So a steady load needs a handful of programs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bagel_jax.buckets import power_of_two
from bagel_jax.engine.context.jobs import ContextJob
from bagel_jax.engine.context.scheduler import MAX_TEXTS, TEXT_BESIDE_IMAGE, StepPlan
from bagel_jax.engine.context.steps import DecodeBatch, PrefillBatch
from bagel_jax.layout import Tokens
from bagel_jax.sampling.tokens import SamplingParams

_LEAST_TEXT = 16


def _table(pages: Sequence[Sequence[int]], size: int, width: int) -> np.ndarray:
    table = np.zeros((size, width), np.int32)
    for row, own in zip(table, pages, strict=False):
        row[: len(own)] = own
    return table


def page_table(jobs: Sequence[ContextJob], size: int, width: int) -> np.ndarray:
    """The pages of the sequences that decode, `[size, width]`."""
    return _table([job.sequences[0].pages for job in jobs], size, width)


def decode_batch(jobs: Sequence[ContextJob], size: int) -> tuple[DecodeBatch, SamplingParams]:
    """The next token of each job, in `size` rows."""

    def column(values, dtype=np.int32, padding=0):
        return np.asarray([*values, *[padding] * (size - len(jobs))], dtype)

    sequences = [job.sequences[0] for job in jobs]
    decoding = [job.decoding for job in jobs]
    batch = DecodeBatch(
        token=column(s.tail[-1] for s in sequences),
        place=column(s.next.place for s in sequences),
        rope=column(s.next.rope for s in sequences),
        count=column(s.fed for s in sequences),
        limit=column(d.limit for d in decoding),
        done=column((False for _ in jobs), bool, True),
    )
    sampling = SamplingParams(
        key=np.asarray([*(d.key for d in decoding), *[(0, 0)] * (size - len(jobs))], np.uint32).reshape(size, 2),
        do_sample=column((d.do_sample for d in decoding), bool, False),
        temperature=column((d.temperature for d in decoding), np.float32, 1),
        top_k=column(d.top_k for d in decoding),
        top_p=column((d.top_p for d in decoding), np.float32, 1),
    )
    return batch, sampling


def prefill_batch(plan: StepPlan, image, page_size: int, width: int) -> PrefillBatch:
    """What a step prefills; `image` is the block's embedded tokens `[N, D]`, padded, or None."""
    parts = [part for chunk in plan.texts for part in chunk.parts]
    text = Tokens(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    count = len(text.id)
    size = TEXT_BESIDE_IMAGE if plan.image is not None else power_of_two(count, _LEAST_TEXT)
    extra = 0 if image is None else image.shape[0]

    ids = np.zeros(size, np.int32)
    ids[:count] = text.id
    rope, kv_end, page, slot = np.zeros((4, size + extra), np.int32)
    ends = np.cumsum([0, *(chunk.count for chunk in plan.texts)])
    table = _table([chunk.sequence.pages for chunk in plan.texts], MAX_TEXTS + 2, width)

    def stand(at: slice, laid: Tokens, pages: Sequence[int]) -> None:
        own = np.asarray(pages, np.int32)
        rope[at], kv_end[at] = laid.rope, laid.kv_end
        page[at], slot[at] = own[laid.place // page_size], laid.place % page_size

    for start, end, chunk in zip(ends[:-1], ends[1:], plan.texts, strict=True):
        stand(slice(start, end), text.of(slice(start, end)), chunk.sequence.pages)
    if plan.image is not None:
        pages = plan.image.sequence.pages
        stand(slice(size, size + plan.image.segment.num_inside), plan.image.inside, pages)
        table[-1, : len(pages)] = pages
    # The texts, then padding as a sequence of its own, then the image.
    offsets = np.asarray([*ends, *[count] * (MAX_TEXTS - len(plan.texts)), size, size + extra], np.int32)
    return PrefillBatch(ids, image, rope, page, slot, kv_end, offsets, table)
