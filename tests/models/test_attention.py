"""Attention against the definition, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_jax.models import attention
from bagel_jax.models.attention import KV, attend


def naive(q, fresh, kv_end, prefix=None, prefix_len=0):
    """One query and one head at a time."""
    out = np.zeros(q.shape)
    group = q.shape[1] // fresh.k.shape[1]
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys, values = (np.asarray(x[: kv_end[t], head // group], np.float64) for x in fresh)
            if prefix is not None:
                past = [np.asarray(x[:prefix_len, head // group], np.float64) for x in prefix]
                keys, values = np.concatenate([past[0], keys]), np.concatenate([past[1], values])
            if not len(keys):
                out[t, head] = np.nan
                continue
            scores = keys @ np.asarray(q[t, head], np.float64) / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ values / weights.sum()
    return out


def draw(seed, queries, keys, past, kv_heads, group, width):
    generator = np.random.RandomState(seed)

    def normal(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    q = 2 * normal(queries, kv_heads * group, width)
    fresh = KV(normal(keys, kv_heads, width), normal(keys, kv_heads, width))
    prefix = None if past is None else KV(normal(past, kv_heads, width), normal(past, kv_heads, width))
    return q, fresh, prefix


@pytest.fixture
def slices(monkeypatch):
    """Makes attention work on a few queries at a time."""

    def set_limit(scores):
        monkeypatch.setattr(attention, "_max_scores", lambda: scores)

    return set_limit


SHAPES = [  # keys, prefix, key-value heads and query heads for each
    (1, None, 1, 1),
    (9, None, 2, 2),
    (6, 1, 1, 3),
    (5, 7, 2, 2),
]
compiled = jax.jit(attend)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), shape=st.sampled_from(SHAPES), data=st.data())
def test_attention_is_softmax_over_what_is_seen(seed, shape, data):
    """A token sees too much or too little, or a query head reads another group's keys."""
    keys, past, *heads = shape
    q, fresh, prefix = draw(seed, keys, keys, past, *heads, 4)
    kv_end = np.asarray(sorted(data.draw(st.lists(st.integers(1, keys), min_size=keys, max_size=keys))), np.int32)
    length = 0 if past is None else data.draw(st.integers(0, past))
    ours = compiled(q, fresh, kv_end, prefix, jnp.int32(length))
    np.testing.assert_allclose(ours, naive(q, fresh, kv_end, prefix, length), rtol=1e-4, atol=1e-5)


def test_staircase():
    """The mask drawn in the module's docstring is another one than the one in use."""
    q, fresh, prefix = draw(0, 5, 5, 3, 1, 1, 4)
    kv_end = np.asarray([1, 2, 5, 5, 5])
    seen = np.asarray([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1] * 5, [1] * 5, [1] * 5], bool)
    values = KV(fresh.k, np.eye(5, 4 + 1, dtype=np.float32)[:, None])
    zeros = KV(prefix.k, np.zeros((3, 1, 5), np.float32))
    # With unit vectors for values, the output is the weights themselves.
    q5, k5, p5 = (np.pad(x, ((0, 0), (0, 0), (0, 1))) for x in (q, fresh.k, prefix.k))
    weights = np.asarray(attend(q5, KV(k5, values.v), kv_end, KV(p5, zeros.v), 3))[:, 0]
    assert np.array_equal(weights > 0, seen)
    assert (weights.sum(-1) < 1).all()  # the rest is on the prefix
    alone = np.asarray(attend(q5, KV(k5, values.v), kv_end))[:, 0]
    np.testing.assert_allclose(alone.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("length", range(6))
def test_prefix_lengths(length):
    """The last token of a context is left out, or rubbish behind it is attended."""
    q, fresh, prefix = draw(1, 4, 4, 5, 2, 2, 8)
    kv_end = np.asarray([1, 2, 4, 4])
    ours = compiled(q, fresh, kv_end, prefix, jnp.int32(length))
    cut = KV(*(x[:length] for x in prefix)) if length else None
    np.testing.assert_allclose(ours, attend(q, fresh, kv_end, cut, length), rtol=1e-5, atol=1e-6)
    poisoned = KV(*(np.where(np.arange(5)[:, None, None] < length, x, 1e6).astype(np.float32) for x in prefix))
    np.testing.assert_array_equal(ours, compiled(q, fresh, kv_end, poisoned, jnp.int32(length)))


@pytest.mark.parametrize("limit", [1, 60, 97, 10**4])
@pytest.mark.parametrize("past", [None, 5])
def test_slices_change_nothing(slices, limit, past):
    """A large picture, whose scores are computed a slice at a time, comes out otherwise."""
    q, fresh, prefix = draw(2, 11, 11, past, 2, 2, 4)
    kv_end = np.asarray([1, 2, 3, 7, 7, 7, 7, 8, 11, 11, 11])
    ours = []
    for scores in (10**9, limit):
        slices(scores)
        ours.append(np.asarray(attend(q, fresh, kv_end, prefix, 3)))
    assert ours[1].shape == q.shape
    np.testing.assert_allclose(ours[1], ours[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[1], naive(q, fresh, kv_end, prefix, 3), rtol=1e-4, atol=1e-5)


def test_large_scores_never_exist_at_once(slices):
    """A 1024 x 1024 picture runs out of memory: all its scores are held at the same time."""
    slices(2000)
    q, fresh, _ = draw(0, 500, 500, None, 1, 2, 4)
    compiled = jax.jit(lambda q, k, v, e: attend(q, KV(k, v), e)).lower(q, *fresh, np.full(500, 500)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 500 * 500 * 2 * 4 / 4


def test_rows_that_see_nothing_are_finite(slices):
    """Padding turns into NaN, which spreads over the whole picture."""
    q, fresh, prefix = draw(3, 4, 4, 5, 1, 2, 4)
    kv_end = np.asarray([0, 0, 4, 4])
    for limit in (10**9, 1):
        slices(limit)
        ours = np.asarray(attend(q, fresh, kv_end, prefix, 0))
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours[2:], naive(q, fresh, kv_end)[2:], rtol=1e-4, atol=1e-5)
        assert np.isfinite(attend(q, fresh, np.zeros(4, np.int32))).all()


@pytest.mark.parametrize("part", ["fresh", "prefix"])
def test_large_scores_do_not_overflow(part):
    """Attention overflows where one key stands out: NaN in the picture."""
    q, fresh, prefix = draw(4, 3, 3, 4, 1, 1, 4)
    if part == "fresh":
        fresh = KV(fresh.k * 1e3, fresh.v)
    else:
        prefix = KV(prefix.k * 1e3, prefix.v)
    kv_end = np.asarray([1, 2, 3])
    ours = attend(q, fresh, kv_end, prefix, 4)
    np.testing.assert_allclose(ours, naive(q, fresh, kv_end, prefix, 4), rtol=1e-3, atol=1e-4)


def test_bfloat16_sums_in_float32():
    """In bfloat16, thousands of small weights are lost as they are added up."""
    keys = 4096
    q = jnp.zeros((1, 1, 8), jnp.bfloat16)
    ones = KV(jnp.zeros((keys, 1, 8), jnp.bfloat16), jnp.ones((keys, 1, 8), jnp.bfloat16))
    out = attend(q, ones, jnp.asarray([keys]), ones, keys)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1, rtol=1e-2)
