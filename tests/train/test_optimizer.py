"""Learning rates and AdamW."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bagel_jax.train.config import OptimizerTable
from bagel_jax.train.optimizer import learning_rate, make_optimizer


def rates(steps, **fields):
    schedule = learning_rate(OptimizerTable(**fields), steps)
    return np.array([float(schedule(i)) for i in range(steps + 1)])


def test_warm_up_then_constant():
    """The first steps throw a trained model off, or the rate never reaches what was asked for."""
    found = rates(20, learning_rate=0.5, warmup_steps=10)
    np.testing.assert_allclose(found[:11], 0.05 * np.arange(11), rtol=1e-5)
    np.testing.assert_allclose(found[10:], 0.5, rtol=1e-6)


def test_constant_from_the_start():
    """Without a warm-up the rate is 0 for ever."""
    np.testing.assert_allclose(rates(5, learning_rate=0.5, warmup_steps=0), 0.5)


def test_cosine():
    """The rate does not come down to its minimum at the last step, or jumps after the warm-up."""
    found = rates(30, learning_rate=0.5, warmup_steps=10, schedule="cosine", min_learning_rate=0.1)
    np.testing.assert_allclose(found[:11], 0.05 * np.arange(11), rtol=1e-5)
    half = 0.1 + 0.4 * 0.5 * (1 + np.cos(np.pi * np.arange(21) / 20))
    np.testing.assert_allclose(found[10:], half, rtol=1e-5)
    assert found[-1] == pytest.approx(0.1)
    assert float(learning_rate(OptimizerTable(schedule="cosine", warmup_steps=1), 5)(9)) == pytest.approx(1e-7)


def test_cosine_without_warm_up():
    """A cosine without warm-up never starts."""
    found = rates(10, learning_rate=0.5, warmup_steps=0, schedule="cosine", min_learning_rate=0.0)
    np.testing.assert_allclose(found, 0.25 * (1 + np.cos(np.pi * np.arange(11) / 10)), rtol=1e-5, atol=1e-7)


def test_adamw_by_hand():
    """Betas, epsilon or weight decay are others than the configuration's."""
    o = OptimizerTable(
        learning_rate=0.1, warmup_steps=0, beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.3, max_grad_norm=1.0
    )
    optimizer = make_optimizer(o, 10)
    x = {"x": jnp.array([1.0, -2.0])}
    state, expected = optimizer.init(x), np.array([1.0, -2.0])
    m = v = np.zeros(2)
    for i, gradient in enumerate(([3.0, 4.0], [0.1, -0.2], [0.0, 0.5]), 1):
        updates, state = optimizer.update({"x": jnp.array(gradient)}, state, x)
        x = optax.apply_updates(x, updates)
        g = np.array(gradient) / max(1.0, np.linalg.norm(gradient))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        step = (m / (1 - 0.8**i)) / (np.sqrt(v / (1 - 0.9**i)) + 1e-3)
        expected = expected - 0.1 * (step + 0.3 * expected)
        np.testing.assert_allclose(x["x"], expected, rtol=1e-5)
