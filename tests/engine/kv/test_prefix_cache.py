"""Contexts found again by what is in them."""

from __future__ import annotations

import dataclasses

import numpy as np
from dense import view_of
from hypothesis import given
from hypothesis import strategies as st
from serving import serve
from small import model, new_stage, random_image

from bagel_jax.engine.kv.pool import PagePool
from bagel_jax.engine.kv.prefix_cache import Hasher, PrefixCache
from bagel_jax.request import Request


def prepared(modality, *args, request_id="r", **kwargs):
    return model().prepare(Request.create(modality, *args, request_id=request_id, **kwargs))


def chain(made):
    return Hasher(made).chain(p.segment for p in made.plan.sequences[0].compute)


def one(stage, made):
    (finished,) = serve(stage, made).values()
    return finished


def test_what_a_context_is_known_by():
    """Another image, noise, text or order passes for the same; or the same image from another file does not."""
    edit = prepared("img2img", "a red bench", random_image())
    assert chain(edit) == chain(prepared("img2img", "a red bench", random_image().copy()))
    assert len(set(chain(edit))) == 3
    for other, equal in (
        (prepared("img2img", "a blue clock", random_image()), 2),
        (prepared("img2img", "a red bench", random_image(1)), 0),
        (prepared("img2img", "a red bench", random_image(), seed=1), 0),  # noise of the posterior sample
        (prepared("img2text", "a red bench", random_image()), 0),  # no latent block before the patches
        (prepared("img2img", inputs=["a red bench", random_image()]), 0),
    ):
        same = [a == b for a, b in zip(chain(edit), chain(other), strict=False)]
        assert same == [True] * equal + [False] * (len(same) - equal)
    question = chain(prepared("img2text", "a red bench", random_image()))
    assert question[0] == chain(prepared("img2text", "why", random_image(), seed=3))[0]  # no noise in there


@given(st.lists(st.tuples(st.sampled_from(("keep", "find", "room")), st.integers(1, 5)), max_size=50))
def test_the_pool_gets_everything_back(steps):
    """Pages of a prefix that was let go stay held, or those that somebody uses are taken from him."""
    pool = PagePool(10)
    cache = PrefixCache(pool)
    used = pool.allocate(2)
    cache.keep(b"used", used, 100)
    for what, n in steps:
        key = bytes([n])
        if what == "keep":
            pages = pool.allocate(n)
            if pages is not None:
                cache.keep(key, pages, 64 * n)
                pool.release(pages)  # the request that computed them ends
        elif what == "find":
            pages, length = cache.find([b"?", key])
            assert len(pages) == length // 64
        else:
            assert cache.make_room(n)
            assert pool.num_free >= n
    cache.clear()
    assert pool.num_free == 7
    pool.release(used)
    assert pool.num_free == 9


def test_least_recently_used_goes_first():
    """The image that everybody asks about is forgotten before one that nobody does."""
    pool = PagePool(7)
    cache = PrefixCache(pool)
    for name in (b"a", b"b", b"c"):
        pages = pool.allocate(2)
        cache.keep(name, pages, 128)
        pool.release(pages)
    cache.find([b"a"])
    assert cache.make_room(2)
    assert [cache.find([name])[1] for name in (b"a", b"b", b"c")] == [128, 0, 128]


def test_second_question_prefills_the_text_alone():
    """Another question about an image pays for the image again, or gets another answer than without a cache."""
    stage, fresh = new_stage(), new_stage(prefix_cache=False)
    first, second = (prepared("img2text", q, random_image(), max_tokens=9) for q in ("a red bench", "a blue clock"))
    tokens = second.plan.sequences[0].compute[-1].segment.num_tokens
    assert one(stage, first).result.prefilled_tokens > tokens
    again, alone = one(stage, second), one(fresh, second)
    assert again.result.prefilled_tokens == tokens
    assert again.result.cached_prefix_tokens == alone.result.prefilled_tokens - tokens
    assert again.ids == alone.ids
    assert one(fresh, second).result.cached_prefix_tokens == 0
    third = one(stage, first)  # all of it is there
    assert third.result.prefilled_tokens == 0
    assert third.ids == one(fresh, first).ids


def test_second_edit_prefills_the_text_alone():
    """Editing the same image again pays for it again, or makes another image."""
    stage, fresh = new_stage(), new_stage(prefix_cache=False)
    first, second = (prepared("img2img", q, random_image()) for q in ("a red bench", "a blue clock"))
    one(stage, first)
    again, alone = one(stage, second), one(fresh, second)
    tokens = second.plan.sequences[0].compute[-1].segment.num_tokens
    assert again.result.prefilled_tokens == 2 * tokens  # in the full context, and in the one without images
    for view in range(3):
        for x, y in zip(view_of(again.context, view), view_of(alone.context, view), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_kept_prefix_is_not_written_to():
    """A request that goes on from a kept prefix spoils it for the next one: their last page is the same."""
    stage = new_stage(page_size=128)
    made = prepared("img2text", "a red bench", random_image(), max_tokens=9)
    first = one(stage, made)
    for other in ("a blue clock and more", "something else altogether"):
        one(stage, prepared("img2text", other, random_image(), max_tokens=20))
    assert one(stage, made).ids == first.ids


def test_two_at_once_compute_a_image_once():
    """Two questions about an image that come together both pay for it."""
    stage = new_stage()
    made = [prepared("img2text", q, random_image(), request_id=q, max_tokens=4) for q in ("what", "why", "when")]
    counts = [event.result for event in serve(stage, *made).values()]
    texts = sum(one.plan.sequences[0].compute[-1].segment.num_tokens for one in made)
    assert (
        sum(one.prefilled_tokens for one in counts) == made[0].plan.sequences[0].compute[0].segment.num_tokens + texts
    )


def test_the_same_request_twice_at_once():
    """The second of two equal requests waits for ever, or they share what both write to."""
    made = prepared("text2text", "a red bench", max_tokens=12)
    stage = new_stage()
    twin = dataclasses.replace(made, request=dataclasses.replace(made.request, request_id="twin"))
    together = serve(stage, made, twin)
    assert together["r"].ids == together["twin"].ids == one(new_stage(), made).ids
