"""Requests that fail or are cancelled: alone, at once, and leaving nothing behind."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
from mixed_load import empty, mixed, same
from small import CONFIG, new_model, random_image

from bagel_jax.engine.denoise import steps as loop
from bagel_jax.engine.handle import Cancelled
from bagel_jax.engine.handoff import Lease
from bagel_jax.engine.ticket import CONTEXT, DENOISE, Done
from bagel_jax.request import Request

SIZES = {"height": 32, "width": 32}


def test_regression_5_a_failure_is_told_at_once(bagel, monkeypatch):
    """Whoever waits for a context that cannot come waits for a time-out, or for ever."""
    context = bagel.engine.engine.context
    submit = context.submit

    def failing(ticket):
        if ticket.request_id == "bad":
            raise RuntimeError("no such luck")
        submit(ticket)

    monkeypatch.setattr(context, "submit", failing)
    bad, good = (Request.create("text2img", "a bench", **SIZES, steps=3, request_id=i) for i in ("bad", "good"))
    with pytest.raises(RuntimeError, match="no such luck"):
        bagel.submit(bad).result(timeout=60)
    assert bagel.submit(good).result(timeout=60).image is not None


def test_not_a_number_fails_alone(bagel, alone):
    """One request with unusable noise takes its neighbours with it, or gets a black image."""
    requests = [r for r in mixed(12) if r.makes_image]
    noise = {"latent": np.full((64, CONFIG.latent_dim), 3e38, np.float32)}
    bad = bagel.submit(Request.create("text2img", "a bench", **SIZES, steps=4, init_noise=noise))
    handles = [bagel.submit(request) for request in requests]
    with pytest.raises(FloatingPointError, match="not finite"):
        bad.result(timeout=120)
    for request, handle in zip(requests, handles, strict=True):
        same(handle.result(), alone[request.request_id])


def test_a_device_error_in_stage_1_fails_alone(bagel, alone, monkeypatch):
    """One request that makes the device fail takes those with it that share its batch."""
    denoise = loop.denoise

    def failing(static, arrays, state, batch, *rest):
        if (batch.tokens == 35).any():
            state.latents.delete()
            state.pages.delete()
            raise RuntimeError("out of memory")
        return denoise(static, arrays, state, batch, *rest)

    monkeypatch.setattr(loop, "denoise", failing)
    requests = [r for r in mixed(12) if r.makes_image and bagel.prepare(r).initial_latent.shape[0] != 35]
    handles = [bagel.submit(request) for request in requests[:2]]
    bad = bagel.submit(Request.create("text2img", "a bench", height=20, width=28, steps=5))
    handles += [bagel.submit(request) for request in requests[2:]]
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(timeout=120)
    for request, handle in zip(requests, handles, strict=True):
        same(handle.result(), alone[request.request_id])


def test_a_device_error_in_stage_0_fails_alone(bagel, alone, monkeypatch):
    """One prompt that makes the device fail takes all contexts in work with it."""
    context = bagel.engine.engine.context
    dispatch = context._dispatch

    def failing(plan):
        if any(job.ticket.request_id == "bad" for job in plan.jobs):
            context.store.pages.delete()
            raise RuntimeError("out of memory")
        return dispatch(plan)

    monkeypatch.setattr(context, "_dispatch", failing)
    requests = mixed(12)
    handles = [bagel.submit(request) for request in requests[:6]]
    bad = bagel.submit(Request.create("img2text", "a bench", random_image(), max_tokens=4, request_id="bad"))
    handles += [bagel.submit(request) for request in requests[6:]]
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(timeout=120)
    for request, handle in zip(requests, handles, strict=True):
        same(handle.result(timeout=300), alone[request.request_id])


@pytest.mark.parametrize("after", [0, 1, 3])
def test_cancel(bagel, alone, after):
    """A cancelled request goes on, holds its pages, or takes others with it."""
    requests = mixed(12)
    long = Request.create("text2img", "a bench", **SIZES, steps=1000, request_id="long")
    talking = Request.create("text2text", "a bench", max_tokens=2000, request_id="talking")
    dropped = [bagel.submit(long), bagel.submit(talking)]
    handles = [bagel.submit(request) for request in requests]
    for handle in dropped:
        events = handle.events()
        for _ in range(after):
            next(events)
        assert handle.cancel()
        assert not handle.cancel()
        with pytest.raises(Cancelled, match=handle.request_id):
            handle.result()
        list(events)  # they end
    for request, handle in zip(requests, handles, strict=True):
        same(handle.result(), alone[request.request_id])


def test_close_with_work_in_flight():
    """Shutting down hangs, or leaves threads behind that keep the process alive."""
    made = new_model()
    handles = [made.submit(request) for request in mixed(12)]
    made.close()
    outcomes = [handle._future.exception(timeout=0) for handle in handles]
    assert all(outcome is None or isinstance(outcome, Cancelled) for outcome in outcomes)
    assert any(outcome is not None for outcome in outcomes)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bagel-")]
    empty(made)
    assert made.generate("text2text", "a bench", max_tokens=2).text is not None  # and it can go on


def test_a_fault_of_ours_hangs_nobody(bagel, monkeypatch, caplog):
    """An error in the engine itself ends a thread, and whoever waits waits for ever."""
    monkeypatch.setattr(bagel.engine.engine.denoise, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bagel.submit(Request.create("text2img", "a bench", **SIZES, steps=3)).result(timeout=60)
    monkeypatch.undo()
    assert "the engine failed" in caplog.text
    caplog.clear()
    assert bagel.generate("text2img", "a bench", **SIZES, steps=3).image is not None


def test_an_id_may_be_taken_again_after_a_cancel(bagel, alone):
    """What is left of a cancelled request takes the place of the next one with its id, or keeps it waiting for ever."""
    request = next(r for r in mixed(12) if r.makes_image)
    for pause in (0, 0, 0.01, 0.05, 0.1):
        first = bagel.submit(request)
        time.sleep(pause)
        first.cancel()
        same(bagel.submit(request).result(timeout=60), alone[request.request_id])


@pytest.mark.parametrize("stage", [CONTEXT, DENOISE])
def test_an_id_may_be_taken_again_while_its_stage_is_busy(bagel, alone, monkeypatch, stage):
    """What a step says of a cancelled request is taken for the one that has its id by then."""
    modality = "img2text" if stage == CONTEXT else "img2img"
    request, other = [r for r in mixed(12) if r.modality == modality][:2]
    stepping, go_on = threading.Event(), threading.Event()
    at_work = getattr(bagel.engine.engine, stage)
    collect = at_work.collect

    def slow(now):
        events = collect(now)
        if any(isinstance(event, Done) for event in events):
            stepping.set()
            assert go_on.wait(60)
        return events

    monkeypatch.setattr(at_work, "collect", slow)
    first = bagel.submit(dataclasses.replace(other, request_id=request.request_id))
    assert stepping.wait(60)
    first.cancel()
    second = bagel.submit(request)
    go_on.set()
    same(second.result(timeout=60), alone[request.request_id])


def test_many_of_one_id(bagel):
    """A cancelled context on its way to stage 1 takes or gives back the room of the next one with its id."""
    request = Request.create("text2img", "a bench", **SIZES, steps=3, request_id="again")
    context = bagel.context(request)
    expected = bagel.denoise(request, context).latents
    stepping, go_on = threading.Event(), threading.Event()
    denoise = bagel.engine.engine.denoise
    run = denoise.run

    def slow(*args):
        if denoise.jobs:
            stepping.set()
            assert go_on.wait(60)
        return run(*args)

    denoise.run = slow
    other = bagel.submit(Request.create("text2img", "a bench", **SIZES, steps=3))
    assert stepping.wait(60)
    prepared = bagel.prepare(request)
    for _ in range(3):
        bagel.engine.submit(prepared, context=context).cancel()
    last = bagel.engine.submit(prepared, context=context)
    time.sleep(0.1)
    go_on.set()
    np.testing.assert_allclose(last.result(timeout=60).latents, expected, rtol=1e-5, atol=1e-5)
    assert other.result(timeout=60).image is not None


def test_a_context_that_cannot_be_moved_fails_alone(bagel, alone, monkeypatch):
    """A full device takes everybody with it, or the request's place in stage 1 is never given back."""
    moved, export = Lease.moved, Lease.export

    def failing(real):
        def one(lease, *args):
            if lease.views.request_id == "bad":
                raise RuntimeError("out of memory")
            return real(lease, *args)

        return one

    monkeypatch.setattr(Lease, "moved", failing(moved))
    monkeypatch.setattr(Lease, "export", failing(export))
    requests = [r for r in mixed(12) if r.makes_image][:3]
    bad = Request.create("text2img", "a bench", **SIZES, steps=3, request_id="bad")
    handles = [bagel.submit(request) for request in (bad, *requests)]
    with pytest.raises(RuntimeError, match="out of memory"):
        handles[0].result(timeout=60)
    for request, handle in zip(requests, handles[1:], strict=True):
        same(handle.result(timeout=60), alone[request.request_id])
    with pytest.raises(RuntimeError, match="out of memory"):
        bagel.context(bad)
