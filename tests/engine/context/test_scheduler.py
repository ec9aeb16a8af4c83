"""What the next step computes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import model, new_stage, random_image

from bagel_jax.buckets import bucket, power_of_two
from bagel_jax.engine.context.batch import copies_of
from bagel_jax.engine.context.jobs import Decoding, Job
from bagel_jax.engine.context.scheduler import MAX_TEXTS, TEXT_BESIDE_IMAGE, Scheduler
from bagel_jax.engine.kv.pool import PagePool
from bagel_jax.layout import ImageGrids, Text, VaeImage, VitImage, contexts, plan
from bagel_jax.request import Request
from bagel_jax.settings import ServingSettings

MARKERS = 703, 704
HOW = Decoding(10, (0, 0), False, 1.0, 0, 1.0)

texts = st.integers(1, 90).map(lambda n: Text(tuple(range(n))))
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
images = st.builds(ImageGrids, st.just(0), grids, grids | st.none())


@pytest.fixture(scope="module")
def prepared():
    return model().prepare(Request.create("img2img", "a", random_image()))


def jobs_of(prepared, prompts, decode) -> list[Job]:
    made = []
    for i, inputs in enumerate(prompts):
        request = dataclasses.replace(prepared.request, request_id=f"{i}")
        one = dataclasses.replace(prepared, plan=plan(contexts(inputs)), request=request)
        made.append(Job.create(one, dataclasses.replace(HOW) if decode else None, 701))
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
    serving = ServingSettings(
        ar_max_num_seqs=4, max_num_batched_tokens=budget, page_size=page_size, num_pages=num_pages, prefix_cache=False
    )
    scheduler = Scheduler(PagePool(num_pages), serving, MARKERS)
    jobs = [job for job in jobs_of(prepared, prompts, decode) if scheduler.pages_needed(job) < num_pages]
    scheduler.waiting.extend(jobs)
    left = set(jobs)
    for _ in range(1000):
        if not left:
            break
        step = scheduler.plan()
        assert step.rows or step.pieces or any(job.finished for job in left)
        inside = 0 if step.image is None else step.image.segment.num_tokens - 2
        count = sum(len(piece.tokens) for piece in step.pieces)
        beside = len(step.rows) + count + inside - (0 if step.image is None else step.image.segment.num_tokens)
        assert len(step.rows) + count + inside <= budget or (step.image is not None and beside <= len(step.rows))
        assert len(step.pieces) <= MAX_TEXTS
        if step.image is not None:
            assert count <= TEXT_BESIDE_IMAGE
            assert all(end == step.image.kv_end for _, _, _, end in _markers(step))
        for piece in step.pieces:
            s = piece.sequence
            whole = step.image is not None and step.image.sequence is s
            places = [place for _, place, _, _ in piece.tokens]
            if whole:
                places += range(step.image.kv_start, step.image.kv_end - 1)
            assert sorted(places) == list(range(s.computed, s.computed + len(places)))
            assert len(s.pages) * page_size >= s.computed + len(places)
            assert all(end == place + 1 for token, place, _, end in piece.tokens if token not in MARKERS)
            scheduler.computed(s, s.computed + len(places))
        for job in step.rows:
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


def _markers(step):
    return [
        token
        for piece in step.pieces
        if piece.sequence is step.image.sequence
        for token in piece.tokens
        if token[0] in MARKERS
    ]


def test_regression_4_a_context_is_over_when_it_is_computed(prepared):
    """A context is handed over while tokens of it are scheduled, but not computed: pure noise."""
    (job,) = jobs_of(prepared, [[Text(tuple(range(50)))]], decode=False)
    scheduler = Scheduler(PagePool(20), ServingSettings(max_num_batched_tokens=20), MARKERS)
    scheduler.waiting.append(job)
    for _ in range(3):
        assert not job.finished
        step = scheduler.plan()
        assert not job.finished  # planned is not computed
        scheduler.computed(step.pieces[0].sequence, job.sequences[0].computed + len(step.pieces[0].tokens))
    assert job.finished


def test_first_come_first_served(prepared):
    """A large request waits for ever while small ones overtake it."""
    large, small = [Text(tuple(range(600)))], [Text((1, 2))]
    jobs = jobs_of(prepared, [large, large, small, small], decode=False)
    scheduler = Scheduler(PagePool(14), ServingSettings(prefix_cache=False), MARKERS)
    scheduler.waiting.extend(jobs)
    scheduler.plan()
    assert scheduler.running == jobs[:1]  # 10 pages of 13


def test_who_came_last_gives_way(prepared):
    """The oldest request is pre-empted by a new one, again and again."""
    jobs = jobs_of(prepared, [[Text(tuple(range(63)))], [Text(tuple(range(63, 126)))]], decode=True)
    scheduler = Scheduler(PagePool(3), ServingSettings(prefix_cache=False), MARKERS)
    scheduler.waiting.extend(jobs)
    step = scheduler.plan()
    for piece in step.pieces:
        scheduler.computed(piece.sequence, 63)
    for job in jobs:
        job.sequences[0].computed, job.sequences[0].tail = 64, [701, 5]
    step = scheduler.plan()
    assert step.rows == jobs[:1]
    assert list(scheduler.waiting) == jobs[1:]
    assert jobs[1].stats.preemptions == 1
    assert jobs[1].sequences[0].target == 64  # what was decoded is computed again, and not decoded again


def test_guidance_contexts_share_pages():
    """An edit holds its pages once a guidance branch, or they are copied."""
    stage = new_stage(page_size=16, max_num_batched_tokens=16)
    made = model().prepare(Request.create("img2img", inputs=["a red bench " * 12, random_image(), "a blue clock"]))
    (build,) = made.plan.sequences[1:]
    whole = build.shared // 16
    assert whole >= 2
    stage.submit(made)
    stage.step()
    main, img = stage.scheduler.running[0].sequences
    for _ in range(9):
        if not img.forked:
            stage.step()
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
    groups = list(copies_of(wanted))
    assert {len(source) for source, _ in groups} == {8}
    pairs = np.concatenate([np.stack(group, axis=1) for group in groups])
    assert [tuple(p) for p in pairs.tolist() if tuple(p) != (0, 0)] == wanted
    assert list(copies_of([])) == []


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=30))
def test_copies_in_groups_are_copies_one_after_another(copies):
    """A copy of a copy is of what was there before, since all pages of a group are read before any is written."""
    wanted, pages = np.arange(13), np.arange(13)
    for source, target in copies:
        wanted[target] = wanted[source]
    for source, target in copies_of(copies):
        pages[target] = pages[source]
    assert pages.tolist() == wanted.tolist()


@pytest.mark.parametrize("block", [VitImage(0, 70, 70), VaeImage(0, 64, 64)])
def test_a_block_larger_than_the_budget_has_its_own_step(prepared, block):
    """An image larger than the token budget is never computed."""
    grids = ImageGrids(0, (70, 70), (64, 64) if isinstance(block, VaeImage) else None)
    (job,) = jobs_of(prepared, [[grids]], decode=False)
    scheduler = Scheduler(PagePool(200), ServingSettings(max_num_batched_tokens=512), MARKERS)
    scheduler.waiting.append(job)
    step = scheduler.plan()
    assert step.image.segment == block
    assert len(step.pieces) == 1
