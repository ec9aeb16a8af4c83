"""The two stages together: requests that overlap and never mix, and what is told of them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools

import numpy as np
import pytest
from mixed_load import empty, mixed, same
from small import new_model, random_image

from bagel_jax.engine.denoise import steps as loop
from bagel_jax.engine.ticket import CONTEXT, DENOISE, Progress, TextDelta
from bagel_jax.errors import InputError
from bagel_jax.request import Request

SIZES = {"height": 32, "width": 32}


@pytest.mark.parametrize("order", ["as they are", "reversed"])
def test_regressions_1_3_13_25_32_34_each_equals_its_solo_run(bagel, alone, order):
    """Metadata from a FIFO, norms over the batch, sizes that do not fit: a request gets another's image."""
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
    stages = made.engine.engine.context, made.engine.engine.denoise
    runs = [stage.run for stage in stages]

    def counting(i, count):
        def run(*args):
            if i == 1 and dit == 2 > most[1] and len(stages[1].jobs) < dit:
                return False  # or it might have done with each image before the next one's context is there
            dispatched = runs[i](*args)
            most[i] = max(most[i], count())
            return dispatched

        return run

    stages[0].run = counting(0, lambda: len(stages[0].scheduler.running))
    stages[1].run = counting(1, lambda: max((len(call.jobs) for call in stages[1].calls), default=0))
    some = [request for request in mixed(12) if request.makes_image][:5] if dit != 2 else mixed(12)
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
    requests = [Request.create("img2img", f"number {i}", random_image(i), steps=30, seed=i) for i in range(6)]
    list(made.run_many(requests))  # compiles
    made.engine.work.clear()
    list(made.run_many([dataclasses.replace(r, request_id=f"again {i}") for i, r in enumerate(requests)]))
    spans = list(made.engine.work)
    dit = [span for span in spans if span.phase == DENOISE]
    during = [a for a in spans if a.phase == CONTEXT and any(d.started < a.started < d.ended for d in dit)]
    assert len(during) >= 3
    empty(made)


def test_text2img_runs_two_branches_not_three(bagel, monkeypatch):
    """text2img with cfg_img_scale above 1 computes the context without images, which it shares with the full one."""
    rows = rows_seen(monkeypatch)
    bagel.generate("text2img", "a red bench", **SIZES, steps=4, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0))
    assert distinct(rows) == [2]
    rows.clear()
    bagel.generate("text2img", "a red bench", **SIZES, steps=10, timestep_shift=1.0, cfg_interval=(0.5, 1.0))
    assert distinct(rows) == [2, 1]  # calls with guidance, then without
    rows.clear()
    bagel.generate("img2img", "a red bench", random_image(), steps=4)
    assert distinct(rows) == [3]


def distinct(rows: list[int]) -> list[int]:
    """Rows of calls; how many calls one after another have the same depends on how fast they are."""
    return [count for count, _ in itertools.groupby(rows)]


def rows_seen(monkeypatch) -> list[int]:
    """Rows of each call of the denoise program from now on."""
    rows, denoise = [], loop.denoise

    def noting(static, arrays, state, batch, mine, *rest):
        rows.append(len(mine.slot))
        return denoise(static, arrays, state, batch, mine, *rest)

    monkeypatch.setattr(loop, "denoise", noting)
    return rows


def test_img2img_prefills_its_image_once(bagel):
    """Each of three guidance branches prefills the image again."""
    prepared = bagel.prepare(Request.create("img2img", "a red bench", random_image()))
    result = bagel.run(prepared)
    plan = prepared.plan
    text = plan.cond.length - plan.drop_text.length
    assert result.prefilled_tokens == plan.cond.length + text  # the third branch is the text alone
    assert plan.drop_text.length > 2 * text


def test_events(bagel):
    """The text streamed is not the answer, or progress jumps to its end."""
    asking = bagel.submit(Request.create("text2text", "wie grün ist ein Käfer? 一只红色的猫", max_tokens=40))
    drawing = bagel.submit(Request.create("text2img", "a bench", **SIZES, steps=6))
    told = list(asking.events())
    assert all(isinstance(event, TextDelta) for event in told)
    assert "".join(event.text for event in told) == asking.result().text
    assert len(told) > 1
    assert sum(event.tokens for event in told) <= 40
    assert {event.request_id for event in told} == {asking.request_id}
    assert list(asking.events()) == told  # whoever comes later, or beside another, hears everything
    steps = list(drawing.events())
    assert steps[0] == Progress(0, 5, drawing.request_id)
    assert steps[-1] == Progress(5, 5, drawing.request_id)
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
    assert list(handle.events())[-1] == Progress(59, 59, handle.request_id)
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
    assert bagel.prepare(long).plan.cond.length > 2600
    small = new_model(dit_max_num_seqs=1, num_pages=2000)
    with pytest.raises(InputError, match=r"pages of 64 tokens in stage 1, \d+ of them for its image, and there are"):
        small.run(long)
    empty(small)


def test_unknown_device():
    """A device that is not there would be an IndexError after the weights are loaded."""
    with pytest.raises(InputError, match="dit_device is 7; it must be a device's number, from 0 to 0"):
        _ = new_model(dit_device=7).engine


def test_regression_7_nothing_is_left_of_taylorseer(bagel):
    """After one request with TaylorSeer every later one is forecast too, or starts from the other's expansion."""
    plain = Request.create("img2img", "a bench", random_image(), steps=9, request_id="plain")
    before = bagel.run(plain)
    forecast = {"taylorseer": True, "taylorseer_first": 2}
    first = bagel.generate("img2img", "another", random_image(1), steps=12, seed=3, **forecast)
    np.testing.assert_array_equal(bagel.run(plain).latents, before.latents)
    second = bagel.generate("img2img", "another", random_image(1), steps=12, seed=3, **forecast)
    np.testing.assert_array_equal(first.latents, second.latents)
    assert (
        np.abs(first.latents - bagel.generate("img2img", "another", random_image(1), steps=12, seed=3).latents).max()
        > 1e-4
    )
