"""The two stages together: requests that overlap, fail, are cancelled, and never mix."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time

import numpy as np
import pytest
from small import CONFIG, model, new_model, picture

from bagel_jax.ar.stage import Finished
from bagel_jax.diffusion import loop
from bagel_jax.diffusion.stage import Drawn
from bagel_jax.errors import InputError
from bagel_jax.handle import Cancelled, Progress, TextDelta
from bagel_jax.request import Request
from bagel_jax.settings import TOPOLOGIES

SIZES = {"height": 32, "width": 32}


@pytest.fixture(params=TOPOLOGIES)
def bagel(request):
    """A model whose engine has served nobody yet, and is left empty."""
    made = new_model(topology=request.param)
    yield made
    made.close()
    empty(made)


def empty(made) -> None:
    """Nothing is held by a request that is gone: no page, no slot, no thread."""
    engine = made.engine
    while engine._threads:
        time.sleep(0.005)
    assert not engine._records
    assert not engine._moving
    assert not engine.ar._jobs()
    assert not engine.dit.busy
    assert engine.dit.free_pages == engine.dit._pool.num_pages
    assert engine.dit.free_slots == made.settings.dit_max_num_seqs
    engine.ar.scheduler.cache.clear()
    assert engine.ar.scheduler.pool.num_free == engine.ar.scheduler.pool.num_pages


def mixed(count: int, seed: int = 0) -> list[Request]:
    """Requests of all modalities, sizes, steps and settings."""
    random = np.random.RandomState(seed)
    made = []
    for i in range(count):
        modality = ("text2img", "img2img", "img2text", "text2img", "text2text", "img2img")[i % 6]
        options = {"seed": i, "request_id": f"{modality} {i}"}
        image = picture(i, *random.randint(20, 80, 2)) if modality.startswith("img") else None
        if modality.endswith("img"):
            options |= {
                "steps": random.randint(2, 9),
                "cfg_text_scale": random.choice([1.0, 3.0, 5.0]),
                "cfg_img_scale": random.choice([1.0, 2.0]),
                "cfg_interval": [(0.0, 1.0), (0.4, 1.0), (0.2, 0.8)][random.randint(3)],
                "cfg_renorm_type": ["global", "channel", "text_channel"][random.randint(3)],
                "timestep_shift": random.choice([1.0, 3.0]),
                "taylorseer": bool(i % 4 == 3),
                "taylorseer_first": 2,
            }
            if modality == "text2img":
                options |= {"height": 4 * random.randint(2, 9), "width": 4 * random.randint(2, 9)}
                options |= {"think": True, "max_think_tokens": 6} if i % 9 == 0 else {}
        else:
            options["max_tokens"] = random.randint(1, 12)
        made.append(Request.create(modality, f"a bench number {i}", image, **options))
    return made


def same(ours, theirs) -> None:
    """Two results of one request, up to rounding."""
    assert ours.request_id == theirs.request_id
    assert ours.text == theirs.text
    assert (ours.image is None) == (theirs.image is None)
    if ours.image is not None:
        assert ours.image.size == theirs.image.size
        np.testing.assert_allclose(ours.latents, theirs.latents, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def alone():
    """What each of some requests gives with nobody beside it."""
    return {request.request_id: model().run(request) for request in mixed(12)}


@pytest.mark.parametrize("order", ["as they are", "reversed"])
def test_regressions_1_3_13_25_32_34_each_equals_its_solo_run(bagel, alone, order):
    """Metadata from a FIFO, norms over the batch, sizes that do not fit: a request gets another's picture."""
    requests = mixed(12)
    if order == "reversed":
        requests.reverse()
    handles = [bagel.submit(request) for request in requests]
    for request, handle in zip(requests, handles, strict=True):
        same(handle.result(), alone[request.request_id])


@pytest.mark.parametrize(("ar", "dit"), [(8, 2), (2, 8), (1, 1)])
def test_stages_have_batch_sizes_of_their_own(alone, ar, dit):
    """One stage's batch size is the other's, or a stage takes more than its own."""
    made = new_model(ar_max_num_seqs=ar, dit_max_num_seqs=dit)
    most = [0, 0]
    stages = made.engine.ar, made.engine.dit
    steps = [stage.step for stage in stages]

    def counting(i, count):
        def step(*args):
            most[i] = max(most[i], count())
            return steps[i](*args)

        return step

    stages[0].step = counting(0, lambda: len(stages[0].scheduler.running))
    stages[1].step = counting(1, lambda: dit - stages[1].free_slots)
    some = [request for request in mixed(12) if request.makes_picture][:5] if dit != 2 else mixed(12)
    for request, result in made.run_many(some):
        same(result, alone[request.request_id])
    assert 1 <= most[0] <= ar
    assert 1 <= most[1] <= dit
    if dit == 2:
        assert most[1] == 2
    empty(made)


def test_the_stages_overlap():
    """Stage 0 waits while stage 1 works: every request costs the sum of both."""
    made = new_model(prefix_cache=False, dit_max_num_seqs=1)
    requests = [Request.create("img2img", f"number {i}", picture(i), steps=30, seed=i) for i in range(6)]
    list(made.run_many(requests))  # compiles
    made.engine.work.clear()
    list(made.run_many([dataclasses.replace(r, request_id=f"again {i}") for i, r in enumerate(requests)]))
    spans = list(made.engine.work)
    dit = [span for span in spans if span.phase == "dit"]
    during = [a for a in spans if a.phase == "ar" and any(d.started < a.started < d.ended for d in dit)]
    assert len(during) >= 3
    empty(made)


def test_text2img_runs_two_branches_not_three(bagel, monkeypatch):
    """text2img with cfg_img_scale above 1 computes the context without pictures, which it shares with the full one."""
    rows = rows_seen(monkeypatch)
    bagel.generate("text2img", "a red bench", **SIZES, steps=4, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0))
    assert rows == [2]
    rows.clear()
    bagel.generate("text2img", "a red bench", **SIZES, steps=10, timestep_shift=1.0, cfg_interval=(0.5, 1.0))
    assert rows == [2, 1]  # one call with guidance, one without
    rows.clear()
    bagel.generate("img2img", "a red bench", picture(), steps=4)
    assert rows == [3]


def rows_seen(monkeypatch) -> list[int]:
    """Rows of each call of the denoise program from now on."""
    rows, denoise = [], loop.denoise

    def noting(static, arrays, state, batch, mine, *rest):
        rows.append(len(mine.slot))
        return denoise(static, arrays, state, batch, mine, *rest)

    monkeypatch.setattr(loop, "denoise", noting)
    return rows


def test_img2img_prefills_its_picture_once(bagel):
    """Each of three guidance branches prefills the picture again."""
    prepared = bagel.prepare(Request.create("img2img", "a red bench", picture()))
    result = bagel.run(prepared)
    plan = prepared.plan
    text = plan.main.length - plan.text.length
    assert result.prefilled_tokens == plan.main.length + text  # the third branch is the text alone
    assert plan.text.length > 2 * text


def test_regression_5_a_failure_is_told_at_once(bagel, monkeypatch):
    """Whoever waits for a context that cannot come waits for a time-out, or for ever."""
    submit = bagel.engine.ar.submit

    def failing(prepared):
        if prepared.request.request_id == "bad":
            raise RuntimeError("no such luck")
        submit(prepared)

    monkeypatch.setattr(bagel.engine.ar, "submit", failing)
    bad, good = (Request.create("text2img", "a bench", **SIZES, steps=3, request_id=i) for i in ("bad", "good"))
    with pytest.raises(RuntimeError, match="no such luck"):
        bagel.submit(bad).result(timeout=60)
    assert bagel.submit(good).result(timeout=60).image is not None


def test_not_a_number_fails_alone(bagel, alone):
    """One request with unusable noise takes its neighbours with it, or gets a black picture."""
    requests = [r for r in mixed(12) if r.makes_picture]
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
    requests = [r for r in mixed(12) if r.makes_picture and bagel.prepare(r).initial_latent.shape[0] != 35]
    handles = [bagel.submit(request) for request in requests[:2]]
    bad = bagel.submit(Request.create("text2img", "a bench", height=20, width=28, steps=5))
    handles += [bagel.submit(request) for request in requests[2:]]
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(timeout=120)
    for request, handle in zip(requests, handles, strict=True):
        same(handle.result(), alone[request.request_id])


def test_a_device_error_in_stage_0_fails_alone(bagel, alone, monkeypatch):
    """One prompt that makes the device fail takes all contexts in work with it."""
    dispatch = bagel.engine.ar._dispatch

    def failing(plan):
        if any(piece.job.request_id == "bad" for piece in plan.pieces):
            bagel.engine.ar.pages.delete()
            raise RuntimeError("out of memory")
        return dispatch(plan)

    monkeypatch.setattr(bagel.engine.ar, "_dispatch", failing)
    requests = mixed(12)
    handles = [bagel.submit(request) for request in requests[:6]]
    bad = bagel.submit(Request.create("img2text", "a bench", picture(), max_tokens=4, request_id="bad"))
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


def test_a_fault_of_ours_hangs_nobody(bagel, monkeypatch):
    """An error in the engine itself ends a thread, and whoever waits waits for ever."""
    monkeypatch.setattr(bagel.engine.dit, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bagel.submit(Request.create("text2img", "a bench", **SIZES, steps=3)).result(timeout=60)
    monkeypatch.undo()
    assert bagel.generate("text2img", "a bench", **SIZES, steps=3).image is not None


def test_an_id_may_be_taken_again_after_a_cancel(bagel, alone):
    """What is left of a cancelled request takes the place of the next one with its id, or keeps it waiting for ever."""
    request = next(r for r in mixed(12) if r.makes_picture)
    for pause in (0, 0, 0.01, 0.05, 0.1):
        first = bagel.submit(request)
        time.sleep(pause)
        first.cancel()
        same(bagel.submit(request).result(timeout=60), alone[request.request_id])


@pytest.mark.parametrize("stage", ["ar", "dit"])
def test_an_id_may_be_taken_again_while_its_stage_is_busy(bagel, alone, monkeypatch, stage):
    """What a step says of a cancelled request is taken for the one that has its id by then."""
    modality = "img2text" if stage == "ar" else "img2img"
    request, other = [r for r in mixed(12) if r.modality == modality][:2]
    stepping, go_on = threading.Event(), threading.Event()
    at_work = getattr(bagel.engine, stage)
    step = at_work.step

    def slow(*args):
        events = step(*args)
        if any(isinstance(event, Finished | Drawn) for event in events):
            stepping.set()
            assert go_on.wait(60)
        return events

    monkeypatch.setattr(at_work, "step", slow)
    first = bagel.submit(dataclasses.replace(other, request_id=request.request_id))
    assert stepping.wait(60)
    first.cancel()
    second = bagel.submit(request)
    go_on.set()
    same(second.result(timeout=60), alone[request.request_id])


def test_many_of_one_id(bagel):
    """A context on its way to stage 1 gives back the room of the next one with its id."""
    request = Request.create("text2img", "a bench", **SIZES, steps=3, request_id="again")
    context = bagel.context(request)
    expected = bagel.denoise(request, context).latents
    stepping, go_on = threading.Event(), threading.Event()
    step = bagel.engine.dit.step

    def slow(*args):
        stepping.set()
        assert go_on.wait(60)
        return step(*args)

    bagel.engine.dit.step = slow
    other = bagel.submit(Request.create("text2img", "a bench", **SIZES, steps=3))
    assert stepping.wait(60)
    prepared = bagel.prepare(request)
    for _ in range(3):
        first = bagel.engine.submit(prepared, context=context)
        deadline = time.monotonic() + 0.2  # with two threads it is on its way by then
        while not bagel.engine._arrived and time.monotonic() < deadline:
            time.sleep(0.001)
        first.cancel()
    last = bagel.engine.submit(prepared, context=context)
    time.sleep(0.1)
    go_on.set()
    np.testing.assert_allclose(last.result(timeout=60).latents, expected, rtol=1e-5, atol=1e-5)
    assert other.result(timeout=60).image is not None


def test_a_context_that_cannot_be_moved_fails_alone(bagel, alone, monkeypatch):
    """A full device takes everybody with it, or the request's place in stage 1 is never given back."""
    take = bagel.engine.ar.take

    def failing(request_id):
        if request_id == "bad":
            raise RuntimeError("out of memory")
        return take(request_id)

    monkeypatch.setattr(bagel.engine.ar, "take", failing)
    requests = [r for r in mixed(12) if r.makes_picture][:3]
    bad = Request.create("text2img", "a bench", **SIZES, steps=3, request_id="bad")
    handles = [bagel.submit(request) for request in (bad, *requests)]
    with pytest.raises(RuntimeError, match="out of memory"):
        handles[0].result(timeout=60)
    for request, handle in zip(requests, handles[1:], strict=True):
        same(handle.result(timeout=60), alone[request.request_id])
    with pytest.raises(RuntimeError, match="out of memory"):
        bagel.context(bad)


def test_events(bagel):
    """The text streamed is not the answer, or progress jumps to its end."""
    asking = bagel.submit(Request.create("text2text", "wie grün ist ein Käfer? 一只红色的猫", max_tokens=40))
    drawing = bagel.submit(Request.create("text2img", "a bench", **SIZES, steps=6))
    told = list(asking.events())
    assert all(isinstance(event, TextDelta) for event in told)
    assert "".join(event.text for event in told) == asking.result().text
    assert len(told) > 1
    assert sum(event.tokens for event in told) <= 40
    steps = list(drawing.events())
    assert steps[0] == Progress(0, 5)
    assert steps[-1] == Progress(5, 5)
    assert [event.done for event in steps] == sorted({event.done for event in steps})
    assert drawing.done()


def test_await(bagel):
    """A server built on asyncio would block its loop."""

    async def both():
        asking = bagel.submit(Request.create("text2text", "a bench", max_tokens=20))
        drawing = bagel.submit(Request.create("text2img", "a bench", **SIZES, steps=4))
        told = [event.text async for event in asking]
        return "".join(told), await asking, await drawing

    told, answer, drawn = asyncio.run(both())
    assert told == answer.text
    assert drawn.image is not None


def test_a_task_that_stops_waiting_changes_nothing(bagel):
    """A time-out of whoever awaits a request would end it for everybody else, whose events then never end."""

    async def impatient(handle):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle, 0.01)

    handle = bagel.submit(Request.create("text2img", "a bench", **SIZES, steps=60))
    asyncio.run(impatient(handle))
    assert list(handle.events())[-1] == Progress(59, 59)
    assert handle.result().image is not None


def test_one_id_twice(bagel):
    """Two requests of one id: one's answer would go to the other."""
    request = Request.create("text2text", "a bench", max_tokens=200, request_id="twice")
    first = bagel.submit(request)
    with pytest.raises(InputError, match="'twice' is already in work"):
        bagel.submit(request)
    first.cancel()


def test_what_stage_1_has_no_room_for(bagel):
    """A context that stage 1 can never take waits for ever."""
    long = Request.create("text2img", "a bench " * 1400, **SIZES, steps=3)
    assert bagel.prepare(long).plan.main.length > 2600
    small = new_model(dit_max_num_seqs=1, num_pages=2000)
    with pytest.raises(InputError, match=r"pages of 64 tokens in stage 1, which has \d+; give a shorter prompt"):
        small.run(long)
    empty(small)


def test_unknown_device():
    """A device that is not there would be an IndexError after the weights are loaded."""
    with pytest.raises(InputError, match="dit_device is 7; there are 1 devices, numbered from 0"):
        _ = new_model(dit_device=7).engine


def test_regression_7_nothing_is_left_of_taylorseer(bagel):
    """After one request with TaylorSeer every later one is forecast too, or starts from the other's expansion."""
    plain = Request.create("img2img", "a bench", picture(), steps=9, request_id="plain")
    before = bagel.run(plain)
    forecast = {"taylorseer": True, "taylorseer_first": 2}
    first = bagel.generate("img2img", "another", picture(1), steps=12, seed=3, **forecast)
    np.testing.assert_array_equal(bagel.run(plain).latents, before.latents)
    second = bagel.generate("img2img", "another", picture(1), steps=12, seed=3, **forecast)
    np.testing.assert_array_equal(first.latents, second.latents)
    assert (
        np.abs(first.latents - bagel.generate("img2img", "another", picture(1), steps=12, seed=3).latents).max() > 1e-4
    )
