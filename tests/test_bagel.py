"""What is around the engine: dtype, how weights lie, the clock."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections import defaultdict, deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from bagel_jax import bagel
from bagel_jax import clock as clock_module
from bagel_jax.clock import Clock
from bagel_jax.errors import InputError
from bagel_jax.models import weights


def test_float32_on_a_cpu():
    """bfloat16 would be chosen on a CPU, where XLA is slow with it."""
    assert bagel.resolve_dtype("auto") == jnp.float32
    assert bagel.resolve_dtype("bfloat16") == jnp.bfloat16


def test_unknown_dtype():
    """A misspelt dtype would be a KeyError."""
    with pytest.raises(InputError, match=r"float16.*auto, float32, bfloat16"):
        bagel.resolve_dtype("float16")


@pytest.fixture
def compiling(monkeypatch):
    """Compiling that took so many seconds, ending now."""
    monkeypatch.setattr(clock_module, "_compiling", defaultdict(deque))
    return lambda seconds: clock_module._note_compiling(clock_module._COMPILE_EVENTS[0], seconds)


def clock_of(spans, threads=None) -> Clock:
    """A clock of stretches of work by threads, this one if none are named."""
    clock = Clock([threading.get_ident()] if threads is None else threads)
    for span in spans:
        clock.add(*span)
    return clock


def test_nested_tracing_is_counted_once(compiling):
    """A function's tracing holds that of the functions it calls: seconds.compile would exceed the time that passed."""
    clock = Clock([threading.get_ident()])
    started = time.perf_counter()
    time.sleep(0.05)
    compiling(0.01)
    compiling(0.02)
    compiling(0.04)  # the outer one, noted last
    clock.add("denoise", started, time.perf_counter())
    assert clock.seconds["compile"] == pytest.approx(0.04)
    assert 0 < clock.seconds["denoise"] <= time.perf_counter() - started - 0.04


def test_phases_add_up(compiling):
    """Two stretches of one phase would overwrite each other, or compiling before a phase count in it."""
    spans = []
    compiling(5)
    began = time.perf_counter()
    for _ in range(2):
        started = time.perf_counter()
        time.sleep(0.03)
        compiling(0.01)
        spans.append(("prefill", started, time.perf_counter()))
    clock = clock_of(spans)
    assert clock.seconds["compile"] == pytest.approx(0.02)
    assert 0.04 <= clock.seconds["prefill"] <= time.perf_counter() - began - 0.02


def test_other_events_are_no_compiling(compiling):
    """Reading the cache of compiled programs, say, is inside compiling already."""
    started = time.perf_counter()
    time.sleep(0.01)
    clock_module._note_compiling("/jax/compilation_cache/cache_retrieval_time_sec", 0.005)
    assert clock_of([("decode", started, time.perf_counter())]).seconds["compile"] == 0


def test_compiling_counts_where_it_was(compiling):
    """What another program in the process compiles would be taken off the work of the engine's own threads."""
    spans = {}

    def work(seconds):
        started = time.perf_counter()
        time.sleep(0.05)
        if seconds:
            compiling(seconds)
        spans[threading.get_ident()] = "work", started, time.perf_counter()
        both_done.wait()  # or the second thread may get the number of the first

    both_done = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=(seconds,)) for seconds in (0.04, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clocks = [clock_of([span], [thread]).seconds for thread, span in spans.items()]
    assert sorted(clock["compile"] for clock in clocks) == [0, pytest.approx(0.04)]
    assert max(clock["work"] for clock in clocks) >= 0.05
    (compiled,) = (span for span, clock in zip(spans.values(), clocks, strict=True) if clock["compile"])
    assert clock_of([compiled], spans).seconds["compile"] == pytest.approx(0.04)


def test_one_thread_compiles_while_another_reads_its_time(compiling):
    """Stage 1 would end a request, which lists the work of stage 0, just as stage 0 compiles: both would fail."""
    interval = sys.getswitchinterval()
    compiles, stop = [], threading.Event()

    def compile_on():
        compiles.append(threading.get_ident())
        while not stop.is_set():
            compiling(1e-9)

    thread = threading.Thread(target=compile_on)
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        until = time.perf_counter() + 0.3
        while time.perf_counter() < until:
            clock_of([("prefill", 0.0, until)], compiles)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()


class _Copies:
    """The small model's source, with arrays of its own: taking layers apart consumes them."""

    directory, config = small.TOKENIZER, small.CONFIG

    def load(self, dtype, progress=None, sharding=None):
        params = jax.tree.map(jnp.copy, small.weights().params)
        return dataclasses.replace(small.weights(), params=params)


def test_layers_apart(monkeypatch):
    """On a CPU every step copies the weights, or layers that were taken apart come back in another order."""
    stacked = small.model()
    assert not stacked.load_weights()[0].better_unrolled  # small ones stay in the cache, and compile faster
    monkeypatch.setattr(weights, "_CACHE", 0)
    made = bagel.Bagel(_Copies(), "float32", stacked.settings)
    layers = made.load_weights()[0].params["trunk"]["layers"]
    assert len(layers) == small.CONFIG.trunk.num_layers
    for ask in (("text2img", "a red bench"), ("img2text", "a red bench", small.random_image())):
        options = {"steps": 4} if ask[0] == "text2img" else {"max_tokens": 12}
        ours, theirs = (one.generate(*ask, **options) for one in (made, stacked))
        assert ours.text == theirs.text
        if ours.latents is not None:
            np.testing.assert_allclose(ours.latents, theirs.latents, rtol=1e-5, atol=1e-5)
