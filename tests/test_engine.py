"""The engine around the stages: dtype, the clock."""

from __future__ import annotations

import time
from collections import deque

import jax.numpy as jnp
import pytest

from bagel_jax import clock as clock_module
from bagel_jax import engine
from bagel_jax.clock import Clock
from bagel_jax.errors import InputError


def test_float32_on_a_cpu():
    """bfloat16 would be chosen on a CPU, where XLA is slow with it."""
    assert engine.resolve_dtype("auto") == jnp.float32
    assert engine.resolve_dtype("bfloat16") == jnp.bfloat16


def test_unknown_dtype():
    """A misspelt dtype would be a KeyError."""
    with pytest.raises(InputError, match=r"float16.*auto, float32, bfloat16"):
        engine.resolve_dtype("float16")


@pytest.fixture
def compiling(monkeypatch):
    """Compiling that took so many seconds, ending now."""
    monkeypatch.setattr(clock_module, "_compiling", deque())
    return lambda seconds: clock_module._note_compiling(clock_module._COMPILE_EVENTS[0], seconds)


def test_nested_tracing_is_counted_once(compiling):
    """A function's tracing holds that of the functions it calls: seconds.compile would exceed the time that passed."""
    clock = Clock()
    started = time.perf_counter()
    with clock.phase("denoise"):
        time.sleep(0.05)
        compiling(0.01)
        compiling(0.02)
        compiling(0.04)  # the outer one, noted last
    assert clock.seconds["compile"] == pytest.approx(0.04)
    assert 0 < clock.seconds["denoise"] <= time.perf_counter() - started - 0.04


def test_phases_add_up(compiling):
    """Two stretches of one phase would overwrite each other, or compiling before a phase count in it."""
    clock = Clock()
    compiling(5)
    started = time.perf_counter()
    for _ in range(2):
        with clock.phase("prefill"):
            time.sleep(0.03)
            compiling(0.01)
    assert clock.seconds["compile"] == pytest.approx(0.02)
    assert 0.04 <= clock.seconds["prefill"] <= time.perf_counter() - started - 0.02


def test_other_events_are_no_compiling(compiling):
    """Reading the cache of compiled programs, say, is inside compiling already."""
    clock = Clock()
    with clock.phase("decode"):
        time.sleep(0.01)
        clock_module._note_compiling("/jax/compilation_cache/cache_retrieval_time_sec", 0.005)
    assert clock.seconds["compile"] == 0
