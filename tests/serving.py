"""Running stage 0 by hand: contexts of any segments, jobs in the middle of their work, logits of given tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bagel_jax.ar import steps
from bagel_jax.ar.batch import rows_of
from bagel_jax.ar.jobs import Job
from bagel_jax.ar.stage import ContextStage, Failed, Finished, Tokens
from bagel_jax.inputs.plan import Build, Plan, Segment, View, place
from bagel_jax.inputs.prepare import Prepared
from bagel_jax.models.attention import KV


def serve(stage: ContextStage, *prepared: Prepared) -> dict[str, Finished | Failed]:
    """What becomes of requests that are in work together; tokens are heard of as they come, and no others."""
    heard: dict[str, list[int]] = {}
    gone: dict[str, Finished | Failed] = {}
    for one in prepared:
        stage.submit(one)
    while stage.busy:
        for event in stage.step():
            if isinstance(event, Tokens):
                heard.setdefault(event.request_id, []).extend(event.ids)
            else:
                gone[event.request_id] = event
    for key, event in gone.items():
        if isinstance(event, Finished) and event.ids is not None:
            assert event.ids[1:] == heard.get(key, [])
    return gone


def prefilled(stage: ContextStage, prepared: Prepared) -> Job:
    """The job of a request that is about to decode its first token."""
    stage.submit(prepared)
    while not any(job.decodes for job in stage.scheduler.running):
        stage.step()
    return stage.scheduler.running[-1]


def with_segments(prepared: Prepared, segments: Sequence[Segment]) -> Prepared:
    """A request for a picture whose one context is made of any segments."""
    placed = place(segments)
    view = View(0, placed[-1].kv_end, placed[-1].rope + placed[-1].segment.rope_advance)
    request = dataclasses.replace(prepared.request, think=False)
    return dataclasses.replace(prepared, plan=Plan((Build(None, 0, placed),), view, view, view), request=request)


def context_of(stage: ContextStage, prepared: Prepared, segments: Sequence[Segment]) -> KV:
    """Keys and values of any segments, `[L, S, K, E]`, S their number of tokens."""
    made = with_segments(prepared, segments)
    (finished,) = serve(stage, made).values()
    return jax.tree.map(lambda x: x[:, : made.plan.main.length], finished.context.caches[0])


@partial(jax.jit, static_argnames=("static",))
def _logits(static, params, pages, rows):
    return steps.advance(nnx.merge(static.graph, params), pages, rows, None, static)


def logits_of(stage: ContextStage, job: Job, ids: Sequence[int]) -> np.ndarray:
    """Logits `[n, V]` of each step while a prefilled job is fed with `ids`, which become part of its context."""
    (sequence,), logits = job.sequences, []
    static = stage.program
    assert stage.scheduler.grow(sequence, sequence.length + len(ids))
    for token in ids:
        sequence.tail[-1] = int(token)
        rows, _ = rows_of([job], 1, stage.table_width)
        out, stage.pages = _logits(static, stage.weights.params, stage.pages, rows)
        logits.append(np.asarray(out[0]))
        sequence.computed += 1
        sequence.tail.append(0)
    return np.stack(logits)


def cache_of(stage: ContextStage, job: Job, length: int) -> KV:
    """The first tokens of a job's context, `[L, length, K, E]`."""
    return jax.tree.map(lambda x: np.asarray(x[:, :length]), stage.dense(job.sequences[0].pages, length))


def poison(stage: ContextStage) -> None:
    """NaN in all pages, which must make no difference."""
    stage.pages = jnp.full_like(stage.pages, jnp.nan)
