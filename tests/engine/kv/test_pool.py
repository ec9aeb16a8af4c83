"""Pages of the KV cache: who holds which."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import CONFIG

from bagel_jax.engine.kv.blocks import Blocks
from bagel_jax.engine.kv.pool import PagePool
from bagel_jax.engine.kv.prefix_cache import PrefixCache
from bagel_jax.engine.kv.store import largest_context, make_stores, page_bytes
from bagel_jax.errors import InputError
from bagel_jax.placement.placement import Placement
from bagel_jax.settings import EngineConfig


@given(st.lists(st.tuples(st.sampled_from(("allocate", "share", "release")), st.integers(0, 6)), max_size=60))
def test_pages_have_one_owner_until_all_let_go(steps):
    """A page is handed out twice, is never free again, or page 0 belongs to somebody."""
    pool, held = PagePool(12), []
    for what, n in steps:
        counts = Counter(page for pages in held for page in pages)
        if what == "allocate":
            pages = pool.allocate(n)
            assert (pages is None) == (n > 11 - len(counts))
            if pages is not None:
                assert len(set(pages)) == n
                assert not set(pages) & {0, *counts}
                held.append(pages)
        elif held and what == "share":
            pages = held[n % len(held)]
            pool.share(pages)
            held.append(pages)
        elif held:
            pool.release(held.pop(n % len(held)))
        assert pool.num_free == 11 - len({page for pages in held for page in pages})
    for pages in held:
        pool.release(pages)
    assert pool.num_free == pool.num_pages == 11
    assert sorted(pool.allocate(11)) == list(range(1, 12))


def test_what_nobody_holds_cannot_be_given_away():
    """A page released twice has two owners later."""
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.release(pages)
    for wrong in (pages, [0]):
        with pytest.raises(RuntimeError, match="nobody holds"):
            pool.release(wrong)
    with pytest.raises(RuntimeError, match="nobody holds"):
        pool.share(pages)


class Device:
    """A device with so much memory left."""

    def __init__(self, left):
        self.left = left

    def memory_stats(self):
        return {"bytes_limit": self.left + 100, "bytes_in_use": 100}


class Limited(Placement):
    """A placement on a device with so much memory left; arrays go where they always go."""

    def __init__(self, device):
        super().__init__(Placement.on(jax.devices()[0]).mesh)
        object.__setattr__(self, "limited", device)

    device = property(lambda self: self.limited)

    def pages(self):
        return Placement.on(jax.devices()[0]).pages()

    def put(self, tree):
        return tree


def room(*left, **settings) -> list[int]:
    """Pages of the stores of two stages on devices with so much memory left; one: of the store that they share."""
    placements = tuple(Limited(Device(x)) for x in left)
    stores = make_stores((placements[0], placements[-1]), CONFIG, EngineConfig(**settings), jnp.float32)
    return [store.pool.num_pages for store in dict.fromkeys(stores)]


def test_free_memory():
    """The pool takes what weights and programs need too."""
    assert Limited(Device(1000)).free_bytes(0.25) == 250
    assert Placement.on(jax.devices()[0]).free_bytes(0.25) > 2**28  # of this machine


def test_automatic_number_of_pages():
    """The pool takes all memory, or far more pages than requests can fill, or none at all without a word."""
    a_page = page_bytes(CONFIG, 64, jnp.float32, Placement.on(jax.devices()[0]))
    assert a_page == 2 * 2 * 2 * 64 * 8 * 4  # L, K, keys and values, page, E, bytes
    much, four = 10**12, {"ar_max_num_seqs": 4}
    # 80 % of the memory, less page 0.
    assert room(100 * a_page, much, **four) == [79, 2 * 34 + 18]
    assert room(100 * a_page, **four) == [79]
    # An edit of the largest image, 66 + 18 tokens, and 2048 of text: 34 pages.
    assert largest_context(CONFIG, 64) == 34
    # Beside the contexts, 3 pages for each of 6 blocks that are denoised.
    assert room(much, **four) == [4 * 34 + 18]
    assert room(much, much, **four) == [4 * 34, 2 * 34 + 18]
    place = Placement.on(jax.devices()[0])
    for store in make_stores((place, place), CONFIG, EngineConfig(**four), jnp.float32):
        assert (store.pool.num_pages, store.pages.shape[1]) == (4 * 34 + 18, 4 * 34 + 18 + 1)
    given = {"num_pages": 60}
    assert room(100 * a_page, **given) == [59]
    with pytest.raises(InputError, match=rf"num_pages is 60, of {a_page} bytes each; the device has room for 56"):
        room(70 * a_page, **given)
    with pytest.raises(InputError, match=rf"{int(1.6 * a_page)} bytes left.*64 tokens takes {a_page}"):
        room(2 * a_page, **four)


def test_room_for_fewer_images_than_asked_for():
    """Where the largest images of all slots have no room, none is made, though smaller ones or one at a time would."""
    a_page, much = page_bytes(CONFIG, 64, jnp.float32, Placement.on(jax.devices()[0])), 10**12
    assert room(24 * a_page) == [18]
    assert room(much, 50 * a_page)[1] == 39


def test_contexts_leave_room_for_their_images():
    """Contexts that wait for their images hold the pages that the first image needs, for ever."""
    pool = PagePool(31)
    prefixes = PrefixCache(pool)
    blocks = Blocks(pool, prefixes)
    blocks.promise("one", 6)
    blocks.promise("two", 12)
    assert blocks.kept == 12  # they are made one after the other
    pages = pool.allocate(20)
    prefixes.keep(b"kept", pages, 1)
    assert not prefixes.make_room(1, beside=blocks.kept)
    assert pool.num_free == 10  # what is kept is not let go of in vain
    pool.release(pages)
    assert prefixes.make_room(5, beside=blocks.kept)
    assert pool.num_free == 10  # nor before it has to be
    first = blocks.take(6)
    blocks.forgo("one")
    assert blocks.kept == 6  # the rest comes back with the first
    assert blocks.take(30) is None
    second = blocks.take(12)
    assert pool.num_free == 12  # for which the prefix had to go
    blocks.forgo("two")
    assert not blocks.home
    blocks.give_back(first)
    blocks.give_back(second)
    assert blocks.home
    assert pool.num_free == 30
