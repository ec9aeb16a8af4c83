"""The engine as a state machine: driven by hand, under threads that come at the worst moment, and with every fault."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import time

import jax
import numpy as np
import pytest
from mixed_load import empty, mixed, same, stores, wait_for_threads
from small import new_model, random_image

from bagel_jax.bagel import Bagel
from bagel_jax.engine.context import steps
from bagel_jax.engine.core import Engine
from bagel_jax.engine.denoise import decoder
from bagel_jax.engine.denoise import stage as denoise_stage
from bagel_jax.engine.denoise import steps as loop
from bagel_jax.engine.drivers.threads import ThreadDriver
from bagel_jax.engine.handle import Cancelled
from bagel_jax.engine.kv import store as kv_store
from bagel_jax.engine.ticket import CONTEXT, DENOISE, STAGES, Cancel, Collect, Done, Progress, Run, Submit, TextDelta
from bagel_jax.errors import InputError
from bagel_jax.request import Request
from bagel_jax.settings import TOPOLOGIES

SIZES = {"height": 32, "width": 32}
PROGRAMS = {
    steps: ("prefill", "mixed", "decode", "embed_vit", "embed_vae", "encode_image"),
    loop: ("denoise", "join", "leave"),
    decoder: ("decode_latents",),
    kv_store: ("_copy_pages", "_take_pages", "_put_pages"),
}


def bench(request_id: str, count: int = 4, **settings) -> Request:
    """An image from a text."""
    return Request.create("text2img", "a bench", **SIZES | {"steps": count, "request_id": request_id} | settings)


def edit(request_id: str, **settings) -> Request:
    """An edit, of which all three branches differ."""
    return Request.create("img2img", "a red bench", random_image(), steps=5, request_id=request_id, **settings)


def core_of(made: Bagel) -> Engine:
    """An engine of a model, with no driver."""
    return Engine(made.load_weights(), made.placements, made.config, made.dtype, made.tokenizer, made.settings)


def finish(engine: Engine, evaluations: int | None = None) -> list:
    """The events until nothing is in work."""
    events = []
    while engine.tickets:
        events += engine.step([Run(stage, evaluations) for stage in STAGES])
        events += engine.step([Collect(stage) for stage in STAGES])
    return events


def outcomes(events) -> dict:
    """What has become of requests."""
    return {event.request_id: event.outcome for event in events if isinstance(event, Done)}


def free_pages(made: Bagel) -> list[int]:
    """Pages of each store that nobody holds, once nothing is in work and no prefix is kept."""
    wait_for_threads(made)
    found = []
    for store in stores(made.engine.engine):
        store.prefixes.clear()
        found.append(store.pool.num_free)
    return found


# By hand.


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_by_hand(alone, topology):
    """The engine needs threads or a clock of its own, which hosts that work in step, or a test, cannot have."""
    made = new_model(topology=topology)
    before = set(threading.enumerate())
    engine = core_of(made)
    requests = mixed(12)
    events = engine.step([Submit(made.prepare(request)) for request in requests])
    events += finish(engine)
    assert set(threading.enumerate()) <= before
    found = outcomes(events)
    for request in requests:
        same(found[request.request_id], alone[request.request_id])
        mine = [event for event in events if event.request_id == request.request_id]
        assert isinstance(mine[-1], Done)
        assert found[request.request_id].text in (None, "".join(e.text for e in mine if isinstance(e, TextDelta)))
        shown = [(event.done, event.total) for event in mine if isinstance(event, Progress)]
        if request.makes_image:
            total = request.settings.steps - 1
            assert (shown[0], shown[-1]) == ((0, total), (total, total))
            assert shown == sorted(set(shown))
    engine.check()


def programs_of(made: Bagel, seed: int, monkeypatch, *, slow: bool) -> tuple[list, dict]:
    """Programs that an engine dispatches for random commands, with the shapes of their arguments; and the outcomes."""
    seen = []

    def noting(name, program):
        def run(*args, **kwargs):
            shapes = [(x.shape, str(x.dtype)) if hasattr(x, "shape") else x for x in jax.tree.leaves(args)]
            seen.append((name, str(shapes)))
            return program(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for module, names in PROGRAMS.items():
            for name in names:
                patch.setattr(module, name, noting(name, getattr(module, name)))
        random, pause = np.random.RandomState(seed), np.random.RandomState(seed + slow)
        engine, requests, events = core_of(made), mixed(12), []
        clock = 0.0
        while requests or engine.tickets:
            draw = random.randint(8)
            if draw < 2 and requests:
                commands = [Submit(made.prepare(requests.pop()))]
            elif draw == 2 and random.randint(6) == 0 and engine.tickets:
                commands = [Cancel(sorted(engine.tickets)[random.randint(len(engine.tickets))])]
            elif draw < 5:
                commands = [Run(STAGES[random.randint(2)], random.randint(1, 5))]
            else:
                commands = [Collect(STAGES[random.randint(2)])]
            if slow:
                clock += pause.exponential(10.0)
                for stage in STAGES:
                    for call in engine.calls(stage):
                        if pause.randint(2):
                            call.ready.block_until_ready()
            events += engine.step(commands, clock)
    return seen, outcomes(events)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_same_commands_give_the_same_programs(monkeypatch, topology):
    """On several hosts each dispatches something else, which hangs all of them: it depends on time, or on hashes."""
    made = new_model(topology=topology)
    for seed in (0, 1):
        first, results = programs_of(made, seed, monkeypatch, slow=False)
        again, others = programs_of(made, seed, monkeypatch, slow=True)
        assert first == again
        assert {name for name, _ in first} >= {"prefill", "mixed", "decode", "denoise", "join", "leave", "_copy_pages"}
        assert results.keys() == others.keys()
        for request_id, result in results.items():
            assert result.text == others[request_id].text
            if result.latents is not None:
                np.testing.assert_array_equal(result.latents, others[request_id].latents)


# Pages.


def held(engine: Engine) -> int:
    """Pages of stage 0's store that somebody holds."""
    pool = engine.context.store.pool
    return pool.num_pages - pool.num_free


def test_a_context_lies_once():
    """A context that waits, is in work or is kept lies on the device twice or three times: half as many fit."""
    made = new_model(topology="single-stage", page_size=16)
    engine = core_of(made)
    store = engine.context.store
    assert store is engine.denoise.store
    assert held(engine) == 0
    engine.step([Submit(made.prepare(edit("first")))])
    while not engine.offers:
        engine.step([Run(CONTEXT), Collect(CONTEXT)])
    ticket = engine.tickets["first"]
    pages = set(ticket.lease.pages)
    plan = ticket.prepared.plan
    views = plan.cond, plan.drop_text, plan.drop_image
    assert len(pages) < sum(store.count(view.length) for view in views)  # what branches have in common lies once too
    assert held(engine) == len(pages)  # waiting
    assert store.prefixes.pages
    assert store.prefixes.pages <= pages
    engine.step([Run(DENOISE, 1)])
    assert [job.ticket for job in engine.denoise.jobs] == [ticket]
    assert set(ticket.lease.pages) == pages
    (job,) = engine.denoise.jobs
    assert held(engine) == len(pages) + len(job.blocks)  # in work
    assert len(job.blocks) % len(job.view_pages) == 0
    finish(engine)
    kept = store.prefixes.pages
    assert held(engine) == len(kept)
    assert kept <= pages
    engine.step([Submit(made.prepare(edit("second", seed=1, image_seeds=[0])))])
    while not engine.offers:
        engine.step([Run(CONTEXT), Collect(CONTEXT)])
    again = set(engine.tickets["second"].lease.pages)
    assert engine.tickets["second"].result.prefilled_tokens == 0
    assert len(again - kept) <= len(views)  # of each view its last page, which is not full
    assert held(engine) == len(again | kept)
    finish(engine)
    engine.check()


def test_images_take_turns_where_pages_are_few():
    """Contexts that wait hold the pages that the first image is to be denoised in, and nothing goes on for ever."""
    few = {"topology": "single-stage", "dit_max_num_seqs": 2, "page_size": 16}
    made = new_model(**few)
    edits = [made.prepare(edit(f"edit {i}", seed=i)) for i in range(3)]
    text = Request.create("text2text", "a bench", max_tokens=40)
    texts = [made.prepare(dataclasses.replace(text, request_id=f"text {i}")) for i in (0, 1)]
    known, needed = {}, 199
    for most in (2, 1):
        engine = core_of(new_model(num_pages=needed + 1, **few))
        at_once, events = 0, engine.step([Submit(one) for one in (*edits, *texts)])
        ticket = engine.tickets["edit 0"]
        needed = engine.context.pages_needed(ticket) + ticket.blocks
        for _ in range(400):
            if not engine.tickets:
                break
            events += engine.step([Run(CONTEXT), Run(DENOISE, 1)])
            at_once = max(at_once, len(engine.denoise.jobs))
            events += engine.step([Collect(CONTEXT), Collect(DENOISE)])
        told = outcomes(events)
        assert sorted(told) == ["edit 0", "edit 1", "edit 2", "text 0", "text 1"]
        assert at_once == most
        for name in told.keys() & known.keys() - {"text 0", "text 1"}:
            np.testing.assert_allclose(told[name].latents, known[name].latents, atol=1e-5)
        known = told
    refused = outcomes(core_of(new_model(num_pages=needed, **few)).step([Submit(edits[0])]))["edit 0"]
    assert isinstance(refused, InputError)
    assert "ask for a smaller image" in str(refused)


def test_a_moved_context_lies_in_stage_1_alone():
    """With a device for each stage a context goes on taking stage 0's pages while its image is made."""
    made = new_model(prefix_cache=False)
    engine = core_of(made)
    assert engine.context.store is not engine.denoise.store
    engine.step([Submit(made.prepare(edit("first")))])
    while not engine.offers:
        engine.step([Run(CONTEXT), Collect(CONTEXT)])
    count, pool = held(engine), engine.denoise.store.pool
    assert count == len(engine.tickets["first"].lease.pages) > 0
    assert pool.num_free == pool.num_pages
    engine.step([Run(DENOISE, 1)])
    assert held(engine) == 0
    (job,) = engine.denoise.jobs
    assert pool.num_pages - pool.num_free == count + len(job.blocks)
    finish(engine)
    assert pool.num_free == pool.num_pages


# Faults.


def once(monkeypatch, owner, name: str, before=lambda *_: None) -> list:
    """Makes a function raise at its next call; returns a list that is filled when it has."""
    real, raised = getattr(owner, name), []

    def failing(*args, **kwargs):
        if not raised:
            raised.append(name)
            before(*args)
            raise ValueError(f"{name} failed")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return raised


@pytest.mark.parametrize(
    "fault", ["piece", "answer", "prompt", "to_image", "join", "join, latents lost", "copy, pages lost", "leave"]
)
def test_a_fault_fails_one_request(bagel, alone, monkeypatch, fault):
    """Whatever fails for one request ends all others, loses pages for good, or makes every later request fail."""
    requests = mixed(12)
    prepared = [bagel.prepare(request) for request in requests]
    bagel.run(bench("first"))
    before = free_pages(bagel)
    name = fault.split(",")[0]
    if name in ("piece", "answer", "prompt"):
        raised = once(monkeypatch, bagel.tokenizer, name)
    elif name == "to_image":
        raised = once(monkeypatch, denoise_stage, name)
    elif name == "copy":
        eaten = bagel.engine.engine.denoise.store
        raised = once(monkeypatch, eaten, name, lambda *_: eaten.pages.delete())
    else:
        raised = once(monkeypatch, loop, name, (lambda x, *_: x.delete()) if "lost" in fault else lambda *_: None)
    handles = [bagel.submit(one) for one in prepared]
    failed = []
    for request, handle in zip(requests, handles, strict=True):
        error = handle._future.exception(timeout=120)
        if error is None:
            same(handle.result(), alone[request.request_id])
        else:
            failed.append(str(error))
    assert raised
    # A call of several that fails once is done again one by one, where nothing fails any more.
    assert failed == [f"{name} failed"] or (name in ("leave", "copy") and not failed)
    assert free_pages(bagel) == before
    for request in requests[:6]:
        same(bagel.run(request), alone[request.request_id])
    assert free_pages(bagel) == before


class Broken:
    """What a program returned that fails on the device only later."""

    shape = ()

    def __array__(self, *args, **kwargs):
        raise ValueError("found out late")

    block_until_ready = __array__


@pytest.mark.parametrize("where", ["prefill", "decode", "denoise", "start", "Drawing"])
def test_a_device_error_that_is_heard_of_late(bagel, alone, monkeypatch, where):
    """Programs run behind the host, which hears of a failure when it reads: then everybody fails, or hangs."""
    requests = mixed(12)
    before = free_pages(bagel)
    owner = {"prefill": steps, "decode": steps, "denoise": loop, "start": decoder}.get(where, denoise_stage)
    real, broken = getattr(owner, where), []

    def late(*args):
        made = real(*args)
        if broken:
            return made
        broken.append(where)
        if where == "start":
            return Broken()
        if where == "Drawing":
            return dataclasses.replace(made, latents=Broken())
        return (made[0], Broken()) if where == "denoise" else (Broken(), *made[1:])

    monkeypatch.setattr(owner, where, late)
    handles = [bagel.submit(request) for request in requests]
    failed = 0
    for request, handle in zip(requests, handles, strict=True):
        error = handle._future.exception(timeout=120)
        if error is None:
            same(handle.result(), alone[request.request_id])
        else:
            assert str(error) == "found out late"
            failed += 1
    assert broken
    assert failed <= (0 if where == "start" else 1)  # pixels are decoded once more, one by one
    assert free_pages(bagel) == before


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
@pytest.mark.parametrize("when", [TextDelta, Progress, Done])
def test_a_listener_that_raises(bagel, alone, kind, when):
    """A user's callback that raises ends a thread of the engine: all who wait wait for ever."""
    requests = mixed(12)
    before = free_pages(bagel)

    def sink(handle, event):
        if isinstance(event, when):
            raise kind("of the callback")

    think = {"think": True, "max_think_tokens": 4}
    bad = bagel.engine.submit(bagel.prepare(bench("bad", 30, **think)), sink=sink)
    handles = [bagel.submit(request) for request in requests]
    if when is Done:
        assert bad.result(timeout=120).image is not None  # it came before
    else:
        with pytest.raises(kind, match="of the callback"):
            bad.result(timeout=120)
    for request, handle in zip(requests, handles, strict=True):
        same(handle.result(timeout=120), alone[request.request_id])
    assert free_pages(bagel) == before


def test_a_listener_that_cancels_submits_and_closes(bagel, alone):
    """A callback that calls the engine waits for a lock that its own thread holds."""
    request, others = mixed(12)[0], []

    def sink(handle, event):
        if not others:
            others.append(bagel.submit(request))
            handle.cancel()

    def closing(handle, event):
        bagel.close()

    first = bagel.engine.submit(bagel.prepare(bench("first", 30)), sink=sink)
    with pytest.raises(Cancelled):
        first.result(timeout=60)
    same(others[0].result(timeout=60), alone[request.request_id])
    with pytest.raises(Cancelled):
        bagel.engine.submit(bagel.prepare(bench("second", 30)), sink=closing).result(timeout=60)
    same(bagel.submit(request).result(timeout=60), alone[request.request_id])


def test_told_in_order(bagel):
    """The stages tell at once: what stage 0 says comes behind an image's end, where nobody listens any more."""
    heard = []

    def sink(handle, event):
        if isinstance(event, Progress) and event.done == 0:  # stage 0's thread tells this
            time.sleep(0.3)  # by then stage 1's is through
        heard.append(event)

    request = bench("thinking", 3, think=True, max_think_tokens=6)
    bagel.run(request)  # compiles
    handle = bagel.engine.submit(bagel.prepare(request), sink=sink)
    text = handle.result(timeout=60).text
    while not isinstance(heard[-1], Done):
        time.sleep(0.005)
    kinds = [kind for kind, _ in itertools.groupby(map(type, heard))]
    assert kinds == [TextDelta, Progress, Done]
    assert "".join(event.text for event in heard if isinstance(event, TextDelta)) == text
    done = [event.done for event in heard if isinstance(event, Progress)]
    assert (done[0], done[-1]) == (0, 2)
    assert done == sorted(set(done))
    assert list(handle.events()) == heard[:-1]


def damaged(context, how: str):
    """A context that cannot be one."""
    length, table = np.asarray(context.length), np.asarray(context.page_table)
    changes = {
        "too long": {"length": length + 1000},
        "whole pages too long": {"length": (length // 64 + 9) * 64},
        "negative": {"length": -length},
        "no number": {"length": length * np.nan},
        "page beyond": {"page_table": table + 100},
        "negative page": {"page_table": table - 1},
        "pages missing": {"pages": context.pages[:, :1]},
    }
    return dataclasses.replace(context, **changes[how])


HOW = ("too long", "whole pages too long", "negative", "no number", "page beyond", "negative page", "pages missing")


def test_damaged_contexts(bagel):
    """Each damaged context takes pages of stage 1 with it: after fifteen of them nobody gets an image any more."""
    request = edit("edit")
    good = bagel.context(request)
    expected = bagel.denoise(request, good).latents
    before = free_pages(bagel)
    other = bagel.submit(bench("beside", 200))
    for how in [*HOW, *HOW, *HOW]:
        with pytest.raises(InputError, match="the context of 'edit' is damaged"):
            bagel.denoise(request, damaged(good, how))
    assert other.result(timeout=60).image is not None
    assert free_pages(bagel) == before
    np.testing.assert_allclose(bagel.denoise(request, good).latents, expected, rtol=1e-5, atol=1e-5)


def test_damaged_contexts_that_are_found_late(bagel, monkeypatch):
    """The same where what is wrong with a context is found only when it is taken over."""
    request = edit("edit")
    good = bagel.context(request)
    expected = bagel.denoise(request, good).latents
    before = free_pages(bagel)
    monkeypatch.setattr(denoise_stage, "check_context", lambda *_: None)
    for how in 5 * ("too long", "no number", "pages missing"):
        with pytest.raises((ValueError, IndexError)):
            bagel.denoise(request, damaged(good, how))
    assert free_pages(bagel) == before
    np.testing.assert_allclose(bagel.denoise(request, good).latents, expected, rtol=1e-5, atol=1e-5)


# Moments.


def test_a_request_that_comes_while_suspects_restart(bagel, monkeypatch):
    """After a device error one more was let in than there are slots: "None is not in list" instead of an image."""
    denoise, join = loop.denoise, loop.join
    failed, restarted, joining = [], [], threading.Event()

    def failing(static, arrays, state, batch, *rest):
        if batch.active.sum() == 2 and not failed:
            failed.append(True)
            raise RuntimeError("the device failed")
        return denoise(static, arrays, state, batch, *rest)

    def slow(*args, **kwargs):
        if failed:
            restarted.append(True)
            if len(restarted) == 2:  # the last suspect takes its slot
                joining.set()
                time.sleep(0.3)
        return join(*args, **kwargs)

    requests = [bench(str(i), 40, seed=i) for i in range(5)]
    contexts = [bagel.context(request) for request in requests]
    expected = [bagel.denoise(*one).latents for one in zip(requests, contexts, strict=True)]
    monkeypatch.setattr(loop, "denoise", failing)
    monkeypatch.setattr(loop, "join", slow)

    def submit(start, end):
        both = zip(requests[start:end], contexts[start:end], strict=True)
        return [bagel.engine.submit(bagel.prepare(one), context=context) for one, context in both]

    handles = submit(0, 2)
    assert joining.wait(60)
    handles += submit(2, 5)
    for handle, latents in zip(handles, expected, strict=True):
        np.testing.assert_allclose(handle.result(timeout=120).latents, latents, rtol=1e-4, atol=1e-4)
    assert failed


def test_pages_are_lost_while_the_other_stage_waits(alone):
    """One stage's device error, where both share pages, ends the thread of the other: its requests hang."""
    made = new_model(topology="single-stage")
    core = core_of(made)
    driver = ThreadDriver(core)
    dispatch, pending = core.context._dispatch, core.pending
    waiting, go_on = threading.Event(), threading.Event()

    class Late:
        def block_until_ready(self):
            waiting.set()
            assert go_on.wait(60)

    def failing(plan):
        if any(job.ticket.request_id == "bad" for job in plan.jobs):
            core.context.store.pages.delete()
            raise RuntimeError("out of memory")
        return dispatch(plan)

    def late(stage):
        ready = pending(stage)
        return Late() if stage == DENOISE and ready is not None and not waiting.is_set() else ready

    core.context._dispatch, core.pending = failing, late
    request = next(r for r in mixed(12) if r.makes_image)
    good = driver.submit(made.prepare(request))
    assert waiting.wait(60)
    bad = driver.submit(made.prepare(bench("bad")))
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(timeout=60)
    go_on.set()
    same(good.result(timeout=60), alone[request.request_id])
    driver.close()
    core.check()


def test_two_hundred_streams():
    """Each stream takes a thread of a pool that has few: from the seventh on they wait for ever."""
    made = new_model()
    count = 200

    def request(i: int) -> Request:
        if i % 2:
            return bench(str(i), 2 + i % 5, seed=i)
        return Request.create("text2text", f"why {i}", max_tokens=1 + i % 9, request_id=str(i))

    async def stream(i: int) -> bool:
        handle = made.submit(request(i))
        events = [event async for event in handle]
        result = await handle
        assert {event.request_id for event in events} <= {str(i)}  # an answer may be empty
        if i % 2:
            done, total = [event.done for event in events], 1 + i % 5
            assert (done[0], done[-1]) == (0, total)
            assert done == sorted(set(done))
            return result.image is not None
        assert sum(event.tokens for event in events) <= 1 + i % 9
        return "".join(event.text for event in events) == result.text

    async def all_of_them() -> list[bool]:
        return await asyncio.wait_for(asyncio.gather(*map(stream, range(count))), 300)

    assert asyncio.run(all_of_them()) == [True] * count
    empty(made)


def test_first_use_from_several_threads():
    """Two engines, each with weights of its own: one id is in work twice, and closing stops only one of them."""
    made = new_model()
    source, loads = made._source, []

    class Slow:
        def load(self, *args):
            loads.append(True)
            time.sleep(0.2)
            return source.load(*args)

    made._source = Slow()
    barrier, engines, handles, refused = threading.Barrier(6), [], [], []

    def use() -> None:
        barrier.wait()
        try:
            handles.append(made.submit(bench("the same id", 300)))
        except InputError as error:
            refused.append(str(error))
        engines.append(made.engine)

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, engines))) == 1
    assert len(engines) == 6
    assert loads == [True]
    assert len(handles) == 1
    assert len(refused) == 5
    assert "'the same id' is already in work" in refused[0]
    made.close()
    assert handles[0].done()
    empty(made)


def test_cancelling_a_long_image_nobody_watches(tiny):
    """All 1,000 steps are one call, since nobody watches: who cancels waits for minutes until the device is free."""
    long = Request.create("text2img", "a bench", height=256, width=256, steps=1000)
    took = []
    while len(took) < 6 and min(took, default=1) >= 1:  # others may be at work on the machine
        handle = tiny.submit(dataclasses.replace(long, request_id=f"long {len(took)}"))
        core = tiny.engine.engine
        while not any(job.done > 3 for job in core.denoise.jobs):
            assert not handle.done()
            time.sleep(0.005)
        started = time.perf_counter()
        assert handle.cancel()
        with pytest.raises(Cancelled):
            handle.result(timeout=0)
        while tiny.engine._threads:
            time.sleep(0.001)
        took.append(time.perf_counter() - started)
        assert not core.tickets
    assert min(took) < 1
    empty(tiny)


def test_what_was_told_before_a_fault_is_not_lost(monkeypatch):
    """A request that was done just before the engine failed waits for ever for its answer."""
    engine = core_of(new_model())
    made = new_model().prepare(Request.create("text2text", "a bench", max_tokens=1, request_id="done"))
    engine.step([Submit(made)])
    monkeypatch.setattr(engine, "check", lambda: 1 / 0)
    events, failed = [], False
    while not failed:
        try:
            events += engine.step([Run("context"), Collect("context")])
        except ZeroDivisionError:
            failed = True
    monkeypatch.undo()
    events += engine.give_up(RuntimeError("a fault"))
    assert [event.request_id for event in events if isinstance(event, Done)] == ["done"]
    engine.check()


def test_room_is_not_made_in_vain():
    """Every kept prefix is let go of for a request that there is no room for all the same."""
    engine = core_of(new_model(num_pages=6))
    store = engine.context.store
    held, kept = store.allocate(2), store.allocate(2)
    store.prefixes.keep(b"one", kept, 100)
    store.pool.release(kept)
    assert store.allocate(4) is None
    assert store.prefixes.pages == set(kept)
    assert store.allocate(3) is not None
    assert store.prefixes.pages == set()
    store.pool.release(held)


def test_a_given_context_lets_those_pass_that_hold_its_pages(monkeypatch):
    """A context from a file waits for pages that are held by contexts which wait behind it, all for ever."""
    made = new_model(topology="single-stage", num_pages=60)
    first, second = (
        Request.create("text2img", "a bench", height=16, width=16, steps=2, request_id=name) for name in ("one", "two")
    )
    context = made.context(first)
    engine = core_of(new_model(topology="single-stage", num_pages=60))
    engine.step([Submit(made.prepare(second))])
    while not engine.offers:
        engine.step([Run("context"), Collect("context")])
    engine.step([Submit(made.prepare(first), context)])
    engine.offers.rotate(1)
    store = engine.context.store
    taken = store.allocate(store.pool.num_free - store.blocks.kept)  # only what the second holds comes free
    events = []
    for _ in range(50):
        if any(isinstance(event, Done) and event.request_id == "two" for event in events):
            break
        events += engine.step([Run("denoise"), Collect("denoise")])
    assert [event.request_id for event in events if isinstance(event, Done)] == ["two"]
    store.pool.release(taken)
    events += finish(engine)
    assert {event.request_id for event in events if isinstance(event, Done)} == {"one", "two"}
    made.close()
