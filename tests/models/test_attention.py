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


def naive(q, kv, kv_end):
    """One query and one head at a time."""
    out = np.zeros(q.shape)
    group = q.shape[1] // kv.k.shape[1]
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys, values = (np.asarray(x[: kv_end[t], head // group], np.float64) for x in kv)
            if not len(keys):
                out[t, head] = np.nan
                continue
            scores = keys @ np.asarray(q[t, head], np.float64) / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ values / weights.sum()
    return out


def draw(seed, queries, keys, kv_heads, group, width):
    generator = np.random.RandomState(seed)

    def normal(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    q = 2 * normal(queries, kv_heads * group, width)
    return q, KV(normal(keys, kv_heads, width), normal(keys, kv_heads, width))


@pytest.fixture
def slices(monkeypatch):
    """Makes attention work on a few queries at a time."""

    def set_limit(scores):
        monkeypatch.setattr(attention, "_MAX_SCORES", dict.fromkeys(("cpu", "default"), scores))

    return set_limit


SHAPES = [  # queries, keys, key-value heads and query heads for each
    (1, 1, 1, 1),
    (9, 9, 2, 2),
    (6, 7, 1, 3),
    (5, 12, 2, 2),
]
compiled = jax.jit(attend)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1000), shape=st.sampled_from(SHAPES), data=st.data())
def test_attention_is_softmax_over_what_is_seen(seed, shape, data):
    """A token sees too much or too little, or a query head reads another group's keys."""
    queries, keys, *heads = shape
    q, kv = draw(seed, queries, keys, *heads, 4)
    ends = st.lists(st.integers(1, keys), min_size=queries, max_size=queries)
    kv_end = np.asarray(sorted(data.draw(ends)), np.int32)
    np.testing.assert_allclose(compiled(q, kv, kv_end), naive(q, kv, kv_end), rtol=1e-4, atol=1e-5)


def test_staircase():
    """The mask of one integer a query is another one than drawn in `paged_attention/api.py`."""
    q, kv = draw(0, 6, 6, 1, 1, 6)
    kv_end = np.asarray([1, 2, 5, 5, 5, 6])
    seen = np.asarray([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], *[[1, 1, 1, 1, 1, 0]] * 3, [1] * 6], bool)
    # With unit vectors for values, the output is the weights themselves.
    weights = np.asarray(attend(q, KV(kv.k, np.eye(6, dtype=np.float32)[:, None]), kv_end))[:, 0]
    assert np.array_equal(weights > 0, seen)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("length", range(1, 6))
def test_prefix_lengths(length):
    """The last token of a context is left out, or rubbish behind it is attended."""
    q, kv = draw(1, 4, 5, 2, 2, 8)
    kv_end = np.full(4, length)
    ours = compiled(q, kv, kv_end)
    np.testing.assert_allclose(ours, attend(q, KV(*(x[:length] for x in kv)), kv_end), rtol=1e-5, atol=1e-6)
    poisoned = KV(*(np.where(np.arange(5)[:, None, None] < length, x, 1e6).astype(np.float32) for x in kv))
    np.testing.assert_array_equal(ours, compiled(q, poisoned, kv_end))


@pytest.mark.parametrize("limit", [1, 60, 97, 10**4])
@pytest.mark.parametrize("past", [0, 5])
def test_slices_change_nothing(slices, limit, past):
    """A large image, whose scores are computed a slice at a time, comes out otherwise."""
    q, kv = draw(2, 11, 11 + past, 2, 2, 4)
    kv_end = np.asarray([1, 2, 3, 7, 7, 7, 7, 8, 11, 11, 11]) + past
    ours = []
    for scores in (10**9, limit):
        slices(scores)
        ours.append(np.asarray(attend(q, kv, kv_end)))
    assert ours[1].shape == q.shape
    np.testing.assert_allclose(ours[1], ours[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[1], naive(q, kv, kv_end), rtol=1e-4, atol=1e-5)


def test_large_scores_never_exist_at_once(slices):
    """A 1024 x 1024 image runs out of memory: all its scores are held at the same time."""
    slices(2000)
    q, kv = draw(0, 500, 500, 1, 2, 4)
    compiled = jax.jit(lambda q, k, v, e: attend(q, KV(k, v), e)).lower(q, *kv, np.full(500, 500)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 500 * 500 * 2 * 4 / 4


def test_rows_that_see_nothing_are_finite(slices):
    """Padding turns into NaN, which spreads over the whole image."""
    q, kv = draw(3, 4, 4, 1, 2, 4)
    kv_end = np.asarray([0, 0, 4, 4])
    for limit in (10**9, 1):
        slices(limit)
        ours = np.asarray(attend(q, kv, kv_end))
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours[2:], naive(q, kv, kv_end)[2:], rtol=1e-4, atol=1e-5)
        assert np.isfinite(attend(q, kv, np.zeros(4, np.int32))).all()


@pytest.mark.parametrize("large", [slice(0, 4), slice(4, 7)], ids=["first", "last"])
def test_large_scores_do_not_overflow(large):
    """Attention overflows where one key stands out: NaN in the image."""
    q, kv = draw(4, 3, 7, 1, 1, 4)
    kv.k[large] *= 1e3
    kv_end = np.asarray([5, 6, 7])
    np.testing.assert_allclose(attend(q, kv, kv_end), naive(q, kv, kv_end), rtol=1e-3, atol=1e-4)


def test_bfloat16_sums_in_float32():
    """In bfloat16, thousands of small weights are lost as they are added up."""
    keys = 8192
    q = jnp.zeros((1, 1, 8), jnp.bfloat16)
    ones = KV(jnp.zeros((keys, 1, 8), jnp.bfloat16), jnp.ones((keys, 1, 8), jnp.bfloat16))
    out = attend(q, ones, jnp.asarray([keys]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1, rtol=1e-2)


def test_slices_are_the_targets(monkeypatch):
    """A program compiled ahead for a TPU would get the slices of the processor that compiles it."""
    monkeypatch.setattr(attention, "_MAX_SCORES", {"cpu": 2000, "default": 10**9})
    q, kv = draw(0, 500, 500, 1, 2, 4)
    traced = jax.jit(lambda q, k, v, e: attend(q, KV(k, v), e)).trace(q, *kv, np.full(500, 500))
    loops = ["stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")]
    assert loops == [True, False]
