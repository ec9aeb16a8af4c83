"""What the next step computes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import step, submit, ticket_of
from small import model, new_stage, random_image

from bagel_jax.buckets import bucket, power_of_two
from bagel_jax.engine.context.jobs import ContextJob, Decoding
from bagel_jax.engine.context.scheduler import MAX_TEXTS, TEXT_BESIDE_IMAGE, Scheduler
from bagel_jax.engine.kv.blocks import Blocks
from bagel_jax.engine.kv.pool import PagePool
from bagel_jax.engine.kv.prefix_cache import PrefixCache
from bagel_jax.engine.kv.store import KVStore, _groups
from bagel_jax.layout import ImageGrids, Text, VaeImage, VitImage, contexts, plan
from bagel_jax.request import Request
from bagel_jax.settings import EngineConfig

MARKERS = 703, 704
HOW = Decoding(10, (0, 0), False, 1.0, 0, 1.0)

texts = st.integers(1, 90).map(lambda n: Text(tuple(range(n))))
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
images = st.builds(ImageGrids, st.just(0), grids, grids | st.none())


@pytest.fixture(scope="module")
def prepared():
    return model().prepare(Request.create("img2img", "a", random_image()))


class Books(KVStore):
    """Who holds which page, without the pages."""

    def __init__(self, num_pages: int, page_size: int = 64):
        self.pool, self.page_size = PagePool(num_pages), page_size
        self.prefixes = PrefixCache(self.pool)
        self.blocks = Blocks(self.pool, self.prefixes)


def scheduler_of(num_pages: int, **given) -> Scheduler:
    config = EngineConfig(**given)
    return Scheduler(Books(num_pages, config.page_size), config, MARKERS)


def jobs_of(prepared, prompts, decode) -> list[ContextJob]:
    made = []
    for i, inputs in enumerate(prompts):
        request = dataclasses.replace(prepared.request, request_id=f"{i}")
        one = dataclasses.replace(prepared, plan=plan(contexts(inputs)), request=request)
        job = ContextJob.create(ticket_of(one), 701)
        if decode:
            job.decoding, job.sequences[0].tail = dataclasses.replace(HOW), [701]
        made.append(job)
    return made


@settings(deadline=None, max_examples=60)
@given(
    prompts=st.lists(st.lists(texts | images, min_size=1, max_size=4), min_size=1, max_size=5),
    decode=st.booleans(),
    budget=st.integers(16, 300),
    page_size=st.sampled_from((16, 64)),
    num_pages=st.integers(30, 200),
)
def test_regression_24_steps_are_sound(prepared, prompts, decode, budget, page_size, num_pages):
    """A chunk ends inside an image's block, a step passes its budget, a token is computed twice or never."""
    limits = {"ar_max_num_seqs": 4, "max_num_batched_tokens": budget}
    scheduler = scheduler_of(num_pages, page_size=page_size, prefix_cache=False, **limits)
    jobs = [job for job in jobs_of(prepared, prompts, decode) if scheduler.pages_needed(job) < num_pages]
    scheduler.waiting.extend(jobs)
    left = set(jobs)
    for _ in range(1000):
        if not left:
            break
        made = scheduler.plan(1, 0.0)
        assert made.rows or made.texts or any(job.finished for job in left)
        inside = 0 if made.image is None else made.image.segment.num_tokens - 2
        count = sum(text.count for text in made.texts)
        beside = len(made.rows) + count + inside - (0 if made.image is None else made.image.segment.num_tokens)
        assert len(made.rows) + count + inside <= budget or (made.image is not None and beside <= len(made.rows))
        assert len(made.texts) <= MAX_TEXTS
        if made.image is not None:
            end = made.image.inside.kv_end[0]
            assert count <= TEXT_BESIDE_IMAGE
            assert len(made.image.inside.id) == inside
            assert (made.image.inside.kv_end == end).all()
            assert made.image.inside.place.tolist() == list(range(end - 1 - inside, end - 1))
            assert _markers(made) == [end, end]
        for text in made.texts:
            s = text.sequence
            places = [place for part in text.parts for place in part.place.tolist()]
            if made.image is not None and made.image.sequence is s:
                places += made.image.inside.place.tolist()
            assert sorted(places) == list(range(s.computed, s.computed + len(places)))
            assert made.count(text) == len(places)
            assert len(s.pages) * page_size >= s.computed + len(places)
            for part in text.parts:
                own = ~np.isin(part.id, MARKERS)
                assert (part.kv_end == part.place + 1)[own].all()
            scheduler.computed(s, s.computed + len(places))
        for job in made.rows:
            sequence = job.sequences[0]
            assert len(sequence.pages) * page_size > sequence.computed
            sequence.computed += 1
            if len(sequence.tail) >= HOW.limit:
                job.decoding = None
            else:
                sequence.tail.append(5)
        for job in [job for job in scheduler.running if job.finished]:
            scheduler.release(job)
            left.remove(job)
    assert not left
    assert scheduler.pool.num_free == scheduler.pool.num_pages


def _markers(made) -> list[int]:
    """`kv_end` of the markers around a step's image."""
    texts = [text for text in made.texts if text.sequence is made.image.sequence]
    return [int(end) for text in texts for part in text.parts for end in part.kv_end[np.isin(part.id, MARKERS)]]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), num_pages=st.integers(8, 60), most=st.sampled_from((1, 3, 16)))
def test_calls_that_follow_are_sound(prepared, data, num_pages, most):
    """A call that goes on with the last one's rows writes where it has no page, or where another row does."""
    size, budget = 16, 64
    scheduler = scheduler_of(num_pages, page_size=size, prefix_cache=False, ar_max_num_seqs=4)
    prompts = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    jobs = jobs_of(prepared, [[Text(tuple(range(count)))] for count in prompts], True)
    for job in jobs:
        job.decoding.limit = data.draw(st.integers(1, budget))
        job.end = data.draw(st.integers(1, budget))  # tokens after which it says that it is done
    jobs = [job for job in jobs if scheduler.pages_needed(job) < num_pages]
    scheduler.waiting.extend(jobs)
    flight, left = [], set(jobs)

    def lengths(made) -> None:
        """Every row has pages of its own for all that it may write in this call."""
        before = sum(other.tokens for other in flight)
        held = [page for job in scheduler.running for page in job.sequences[0].pages]
        assert len(held) == len(set(held))
        for job in made.rows:
            if job not in scheduler.running or job.decoding is None:
                continue
            s = job.sequences[0]
            until = min(job.decoding.limit, job.end, len(s.tail) - 1 + before + made.tokens)  # fed by then
            assert len(s.pages) * size >= s.behind.place + until

    for _ in range(3000):
        if not left:
            break
        if not flight:
            made = scheduler.plan(most, 0.0)
        else:
            made = scheduler.follow(flight[-1], most) if len(flight) < 2 and flight[-1].rows else None
            if made is not None:
                assert made.rows == flight[-1].rows
                assert not made.texts
                assert len(scheduler.running) == 4 or not scheduler.waiting  # nobody waits who could be let in
        if made is not None:
            lengths(made)
            flight.append(made)
            for text in made.texts:
                scheduler.computed(text.sequence, text.sequence.computed + text.count)
            if made.texts:
                assert len(flight) == 1
        if flight and data.draw(st.booleans()) and left:  # somebody hangs up
            gone = data.draw(st.sampled_from(sorted(left, key=jobs.index)))
            if data.draw(st.integers(0, 9)) == 0:
                scheduler.release(gone)
                gone.ticket.over = True
                left.discard(gone)
        if made is None or data.draw(st.booleans()):
            done = flight.pop(0)
            for job in done.rows:
                for _ in range(done.tokens):
                    if job.ticket.over or job.decoding is None:
                        break
                    s = job.sequences[0]
                    s.computed += 1
                    if len(s.tail) >= min(job.decoding.limit, job.end):
                        job.decoding = None
                    else:
                        s.tail.append(5)
            for job in [job for job in scheduler.running if job.finished]:
                scheduler.release(job)
                left.discard(job)
    assert not left
    assert scheduler.pool.num_free == scheduler.pool.num_pages


def test_regression_4_a_context_is_over_when_it_is_computed(prepared):
    """A context is handed over while tokens of it are scheduled, but not computed: pure noise."""
    (job,) = jobs_of(prepared, [[Text(tuple(range(50)))]], decode=False)
    scheduler = scheduler_of(20, max_num_batched_tokens=20)
    scheduler.waiting.append(job)
    for _ in range(3):
        assert not job.finished
        made = scheduler.plan(1, 0.0)
        assert not job.finished  # planned is not computed
        scheduler.computed(made.texts[0].sequence, job.sequences[0].computed + made.texts[0].count)
    assert job.finished


def test_first_come_first_served(prepared):
    """A large request waits for ever while small ones overtake it."""
    large, small = [Text(tuple(range(600)))], [Text((1, 2))]
    jobs = jobs_of(prepared, [large, large, small, small], decode=False)
    scheduler = scheduler_of(14, prefix_cache=False)
    scheduler.waiting.extend(jobs)
    scheduler.plan(1, 0.0)
    assert scheduler.running == jobs[:1]  # 10 pages of 13


def test_who_came_last_gives_way(prepared):
    """The oldest request is pre-empted by a new one, again and again."""
    jobs = jobs_of(prepared, [[Text(tuple(range(63)))], [Text(tuple(range(63, 126)))]], decode=True)
    scheduler = scheduler_of(3, prefix_cache=False)
    scheduler.waiting.extend(jobs)
    for text in scheduler.plan(1, 0.0).texts:
        scheduler.computed(text.sequence, 63)
    for job in jobs:
        job.sequences[0].computed, job.sequences[0].tail = 64, [701, 5]
    assert scheduler.plan(1, 1.0).rows == jobs[:1]
    assert list(scheduler.waiting) == jobs[1:]
    jobs[1].ticket.enter("", 2.0)
    assert [span.phase for span in jobs[1].ticket.spans] == ["prefill", "preempted"]
    assert jobs[1].sequences[0].target == 64  # what was decoded is computed again, and not decoded again


def test_guidance_contexts_share_pages():
    """An edit holds its pages once a guidance branch, or they are copied."""
    stage = new_stage(page_size=16, max_num_batched_tokens=16)
    made = model().prepare(Request.create("img2img", inputs=["a red bench " * 12, random_image(), "a blue clock"]))
    (build,) = made.plan.sequences[1:]
    whole = build.shared // 16
    assert whole >= 2
    submit(stage, made)
    step(stage)
    main, img = stage.scheduler.running[0].sequences
    for _ in range(9):
        if not img.forked:
            step(stage)
    assert main.pages[:whole] == img.pages[:whole]
    assert not set(main.pages[whole:]) & set(img.pages[whole:])


def test_buckets():
    """Padding is dropped or costs as much as the work itself; every length compiles a program of its own."""
    lengths = range(1, 10000)
    for least in (16, 64):
        padded = [bucket(n, least) for n in lengths]
        assert all(p >= n for n, p in zip(lengths, padded, strict=True))
        assert all(p <= max(n + least - 1, n * 9 / 8) for n, p in zip(lengths, padded, strict=True))
        assert padded == sorted(padded)
        assert len(set(padded)) < 80
        assert all(bucket(p, least) == p for p in set(padded))
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 16, 17)] == [1, 2, 4, 4, 8, 16, 32]
    assert power_of_two(3, 16) == 16


def test_copies_come_in_groups():
    """Pages beyond the first eight are not copied, or padding overwrites one."""
    wanted = [(i, i + 100) for i in range(1, 20)]
    groups = list(_groups(wanted))
    assert {len(source) for source, _ in groups} == {8}
    pairs = np.concatenate([np.stack(group, axis=1) for group in groups])
    assert [tuple(p) for p in pairs.tolist() if tuple(p) != (0, 0)] == wanted
    assert list(_groups([])) == []


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=30))
def test_copies_in_groups_are_copies_one_after_another(copies):
    """A copy of a copy is of what was there before, since all pages of a group are read before any is written."""
    wanted, pages = np.arange(13), np.arange(13)
    for source, target in copies:
        wanted[target] = wanted[source]
    for source, target in _groups(copies):
        pages[target] = pages[source]
    assert pages.tolist() == wanted.tolist()


@pytest.mark.parametrize("block", [VitImage(0, 70, 70), VaeImage(0, 64, 64)])
def test_a_block_larger_than_the_budget_has_its_own_step(prepared, block):
    """An image larger than the token budget is never computed."""
    grids = ImageGrids(0, (70, 70), (64, 64) if isinstance(block, VaeImage) else None)
    (job,) = jobs_of(prepared, [[grids]], decode=False)
    scheduler = scheduler_of(200, max_num_batched_tokens=512)
    scheduler.waiting.append(job)
    made = scheduler.plan(1, 0.0)
    assert made.image.segment == block
    assert len(made.texts) == 1
