"""Running stage 0 by hand: contexts of any segments, jobs in the middle of their work, logits of given tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from dense import view_of

from bagel_jax.engine.context import steps
from bagel_jax.engine.context.batch import rows_of
from bagel_jax.engine.context.jobs import Job, Statistics
from bagel_jax.engine.context.stage import ContextStage, Tokens
from bagel_jax.engine.handoff import ContextKV, Failed
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.layout import KVPlan, KVPrefix, Segment, SequencePlan, place
from bagel_jax.models.attention import KV
from bagel_jax.pallas.paged_attention.pages import to_dense


@dataclass(frozen=True)
class Served:
    """A request that has left stage 0, with its context where it makes an image."""

    request_id: str
    ids: list[int] | None
    stats: Statistics
    context: ContextKV | None


def serve(stage: ContextStage, *prepared: Prepared) -> dict[str, Served | Failed]:
    """What becomes of requests that are in work together; tokens are heard of as they come, and no others."""
    heard: dict[str, list[int]] = {}
    gone: dict[str, Served | Failed] = {}
    for one in prepared:
        stage.submit(one)
    while stage.busy:
        for event in stage.step():
            if isinstance(event, Tokens):
                heard.setdefault(event.request_id, []).extend(event.ids)
            elif isinstance(event, Failed):
                gone[event.request_id] = event
            else:
                waits = stage.pages_ready(event.request_id) is not None
                context = stage.take(event.request_id) if waits else None
                gone[event.request_id] = Served(event.request_id, event.ids, event.stats, context)
    for key, event in gone.items():
        if isinstance(event, Served) and event.ids is not None:
            assert event.ids[1:] == heard.get(key, [])
    return gone


def prefilled(stage: ContextStage, prepared: Prepared) -> Job:
    """The job of a request that is about to decode its first token."""
    stage.submit(prepared)
    while not any(job.decodes for job in stage.scheduler.running):
        stage.step()
    return stage.scheduler.running[-1]


def with_segments(prepared: Prepared, segments: Sequence[Segment]) -> Prepared:
    """A request for an image whose one context is made of any segments."""
    placed = place(segments)
    view = KVPrefix(0, placed[-1].kv_end, placed[-1].rope + placed[-1].segment.rope_advance)
    request = dataclasses.replace(prepared.request, think=False)
    return dataclasses.replace(
        prepared, plan=KVPlan((SequencePlan(None, 0, placed),), view, view, view), request=request
    )


def context_of(stage: ContextStage, prepared: Prepared, segments: Sequence[Segment]) -> KV:
    """Keys and values of any segments, `[L, S, K, E]`, S their number of tokens."""
    made = with_segments(prepared, segments)
    (finished,) = serve(stage, made).values()
    assert finished.context.length.tolist() == [made.plan.cond.length]
    return view_of(finished.context)


@partial(jax.jit, static_argnames=("static",))
def _logits(static, params, pages, rows):
    return steps.advance(static.skeleton.merge(params), pages, rows, None, static)


def logits_of(stage: ContextStage, job: Job, ids: Sequence[int]) -> np.ndarray:
    """Logits `[n, V]` of each step while a prefilled job is fed with `ids`, which become part of its context."""
    (sequence,), logits = job.sequences, []
    static = stage.program
    assert stage.scheduler.grow(sequence, sequence.length + len(ids))
    for token in ids:
        sequence.tail[-1] = int(token)
        rows, _ = rows_of([job], 1, stage.table_width)
        out, stage.pages = _logits(static, stage.weights.arrays, stage.pages, rows)
        logits.append(np.asarray(out[0]))
        sequence.computed += 1
        sequence.tail.append(0)
    return np.stack(logits)


def cache_of(stage: ContextStage, job: Job, length: int) -> KV:
    """The first tokens of a job's context, `[L, length, K, E]`."""
    cache = to_dense(stage.pages, np.asarray(job.sequences[0].pages))
    return KV(*(np.asarray(x[:, :length]) for x in cache))


def poison(stage: ContextStage) -> None:
    """NaN in all pages, which must make no difference."""
    stage.pages = jnp.full_like(stage.pages, jnp.nan)
