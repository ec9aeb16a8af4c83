"""Pages of the KV cache: who holds which."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import CONFIG

from bagel_jax.engine.kv.pool import PagePool, choose_num_pages, page_bytes
from bagel_jax.errors import InputError
from bagel_jax.settings import ServingSettings


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


def test_automatic_number_of_pages():
    """The pool takes all memory, or far more pages than requests can fill, or none at all without a word."""
    a_page = page_bytes(CONFIG, 64, jnp.float32)
    assert a_page == 2 * 2 * 2 * 64 * 8 * 4  # L, K, keys and values, page, E, bytes
    settings = ServingSettings(ar_max_num_seqs=4)
    assert choose_num_pages(CONFIG, settings, jnp.float32, Device(100 * a_page)) == 60
    # An edit of the largest image, 66 + 18 tokens, and 2048 of text: 34 pages.
    assert choose_num_pages(CONFIG, settings, jnp.float32, Device(10**12)) == 4 * 34 + 1
    assert choose_num_pages(CONFIG, settings, jnp.float32, jax.devices()[0]) == 4 * 34 + 1
    given = ServingSettings(num_pages=60)
    assert choose_num_pages(CONFIG, given, jnp.float32, Device(100 * a_page)) == 60
    with pytest.raises(InputError, match=rf"num_pages is 60, of {a_page} bytes each; the device has room for 54"):
        choose_num_pages(CONFIG, given, jnp.float32, Device(90 * a_page))
    with pytest.raises(InputError, match=rf"{int(1.2 * a_page)} bytes left.*64 tokens takes {a_page}"):
        choose_num_pages(CONFIG, settings, jnp.float32, Device(2 * a_page))
