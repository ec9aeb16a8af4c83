"""Properties of the tiles that all backends compute, for any batch."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_jax.pallas.paged_attention.tiles import merge, ragged, split, tiles

# Few shapes, so that little is compiled; any contents.
QUERIES, SEQUENCES, ROWS, TILES = 40, 4, 6, 3
few = settings(deadline=None, max_examples=60)
ends = st.lists(st.lists(st.integers(0, 300), min_size=ROWS, max_size=ROWS), min_size=TILES, max_size=TILES)


@few
@given(st.lists(st.integers(0, QUERIES), min_size=SEQUENCES, max_size=SEQUENCES), st.sampled_from([1, 4, 16, 64]))
def test_ragged(borders, block_q):
    """A token would get another sequence's answer if its place among the tiles were not its own."""
    offsets = np.asarray([0, *sorted(borders)], np.int32)
    cut = [np.asarray(x) for x in ragged(offsets, QUERIES, block_q)]
    sequence, query, tile, slot = cut
    assert query.shape == (QUERIES // block_q + SEQUENCES, block_q)
    for token in range(offsets[-1]):
        assert query[tile[token], slot[token]] == token
        assert offsets[sequence[tile[token]]] <= token < offsets[sequence[tile[token]] + 1]
    assert sorted(query[query < QUERIES]) == list(range(offsets[-1]))
    assert (tile < query.shape[0]).all(), "padding is read from beyond the tiles"
    assert (slot < block_q).all()


@few
@given(ends, st.integers(1, 7), st.sampled_from([16, 32, 128]))
def test_split(kv_end, splits, page):
    """A key would be seen twice, or by nobody, where the keys of a tile are cut for several processors."""
    kv_end = np.asarray(kv_end, np.int32)
    whole = tiles(np.arange(TILES, dtype=np.int32), kv_end)
    np.testing.assert_array_equal(whole.stop, kv_end.max(axis=1))
    parts = [np.asarray(x).reshape(TILES, splits, *x.shape[1:]) for x in split(whole, splits, page)]
    keys = np.arange(kv_end.max() + 2 * page)
    seen = np.zeros((TILES, ROWS, keys.size), int)
    for i in range(splits):
        sequence, start, stop, full, end = (x[:, i] for x in parts)
        np.testing.assert_array_equal(sequence, np.arange(TILES))
        assert (start % page == 0).all()
        assert (end.max(axis=1) <= np.maximum(stop, start)).all(), "a row sees what is skipped"
        sees = (start[:, None, None] <= keys) & (keys < end[..., None])
        unmasked = (start[:, None] <= keys) & (keys < full[:, None])
        real = kv_end > 0
        assert (sees | ~unmasked[:, None])[real].all(), "a row needs a mask where there is none"
        seen += sees
    np.testing.assert_array_equal(seen, keys < kv_end[..., None])


@few
@given(st.integers(0, 2**32 - 1), st.lists(st.booleans(), min_size=12, max_size=12))
def test_merge(seed, there):
    """An answer would depend on how many processors shared its keys."""
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal((3, 2, 4)) * 10  # [sets, rows, keys]
    values = generator.standard_normal((3, 2, 4, 5))
    # Whole sets without a key, and some keys of the others.
    seen = np.asarray(there[:6]).reshape(3, 2, 1) & (np.asarray(there[6:]).reshape(3, 2, 1) | (np.arange(4) < 2))
    weights = np.where(seen, np.exp(scores), 0)

    def attend(axes):
        total = weights.sum(axis=axes)
        out = (weights[..., None] * values).sum(axis=axes) / np.where(total == 0, 1, total)[..., None]
        with np.errstate(divide="ignore"):
            return out.astype(np.float32), np.log(total).astype(np.float32)

    out, lse = merge(*attend((2,)), axis=0)
    expected, expected_lse = attend((0, 2))
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-5, atol=2e-5)
