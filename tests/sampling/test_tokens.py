"""Choosing the next token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_jax.sampling.tokens import SamplingParams, choose

choose = jax.jit(choose)


def sampling(rows=1, *, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    keys = jax.vmap(lambda i: jax.random.key_data(jax.random.key(seed, impl="threefry2x32")))(jnp.arange(rows))

    def column(value, dtype):
        return jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))

    return SamplingParams(
        keys,
        column(do_sample, bool),
        column(temperature, jnp.float32),
        column(top_k, jnp.int32),
        column(top_p, jnp.float32),
    )


def draws(chances, count=2000, **how):
    logits = jnp.log(jnp.asarray([chances] * count))
    return np.asarray(choose(logits, jnp.arange(count), sampling(count, **how)))


def test_temperature():
    """The temperature has no effect or the opposite one: odds of 3 : 1 must become 9 : 1 at temperature 0.5."""
    for temperature, chance in ((1.0, 0.75), (0.5, 0.9), (2.0, 0.634)):
        assert draws([1.0, 3.0], temperature=temperature).mean() == pytest.approx(chance, abs=0.04)


def test_top_k_and_top_p():
    """Unlikely tokens are drawn all the same, or likely ones are left out."""
    chances = [0.1, 0.4, 0.3, 0.2]
    assert set(draws(chances, top_k=2)) == {1, 2}
    assert set(draws(chances, top_p=0.65)) == {1, 2}
    assert set(draws(chances, top_p=0.75)) == {1, 2, 3}
    assert set(draws(chances, top_p=0.01)) == {1}
    assert set(draws(chances, top_k=1)) == {1}
    assert set(draws(chances, top_k=9)) == {0, 1, 2, 3}
    assert set(draws(chances, top_k=3, top_p=0.7)) == {1, 2}  # of 0.4, 0.3, 0.2 out of 0.9
    kept = draws(chances, top_k=2)
    assert (kept == 1).mean() == pytest.approx(4 / 7, abs=0.04)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-4, 4, width=16), min_size=12, max_size=12), st.integers(0, 12), st.floats(0.01, 1))
def test_what_is_drawn_is_among_the_likeliest(logits, top_k, top_p):
    """A token that the definition leaves out is drawn."""
    rows = 64
    x = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, 12))
    got = np.unique(choose(x, jnp.arange(rows), sampling(rows, top_k=top_k, top_p=top_p)))
    values = np.asarray(logits, np.float64)
    order = np.argsort(-values, kind="stable")[: top_k or 12]
    chances = np.exp(values[order] - values.max())
    chances /= chances.sum()
    number = int((np.cumsum(chances) - chances < top_p + 1e-5).sum())
    least = values[order[max(0, number - 1)]]
    assert (values[got] >= least - 1e-6).all()


def test_rows_choose_for_themselves():
    """A row samples because another does, or the key of another row decides."""
    logits = jnp.zeros((4, 50)).at[:, 7].set(0.1)
    one = sampling(4, do_sample=False)
    mixed = one._replace(do_sample=jnp.asarray([False, True, True, False]))
    chosen = choose(logits, jnp.zeros(4, jnp.int32), mixed)
    assert (int(chosen[0]), int(chosen[3])) == (7, 7)
    assert int(chosen[1]) == int(chosen[2])  # the same key and step
    others = choose(logits, jnp.asarray([0, 1, 2, 3]), mixed)
    assert int(others[1]) != int(others[2])
