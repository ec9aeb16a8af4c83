"""Shared by all tests: the small checkpoint, its golden cases, and where compiled programs are kept."""

from __future__ import annotations

import functools
import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# One cache of compiled programs for the whole run, command lines started by tests included; not the user's own.
_XLA_CACHE = tempfile.TemporaryDirectory(prefix="bagel_jax_xla_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _XLA_CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Programs that run for milliseconds are compiled in a fraction of the time this way, here and in processes that tests
# start. `XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0` compiles as for a user; .ci/run does so for the golden numbers.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # later ones stop at a flag that they no longer have
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
# Pallas' interpreter of Mosaic GPU blocks a thread of XLA's CPU client for each warpgroup.
os.environ.setdefault("PJRT_NPROC", "8")

import jax  # noqa: E402
import pytest  # noqa: E402

from bagel_jax.models import weights  # noqa: E402

# The same few models are taken apart hundreds of times, which takes a second each. Before others import the function.
weights.abstract_weights = functools.cache(weights.abstract_weights)

from bagel_jax.bagel import Bagel  # noqa: E402
from bagel_jax.checkpoint.source import ModelSource  # noqa: E402

# Traced programs are millions of objects; looking through them all is a tenth of the run with the usual thresholds.
gc.set_threshold(20_000, 20, 50)

DATA = Path(__file__).parent / "data"

# A compiled program of a CPU is mapped into memory in dozens of pieces; Linux gives a process 65,530, and XLA's next
# compilation after them is a segmentation fault.
MAPS = Path("/proc/self/maps")


# Files of few and long tests. What begins last ends last, with the other worker idle.
FIRST = (
    "test_meshes.py",
    "test_lockstep.py",
    "test_random_load.py",
    "test_many_requests.py",
    "test_shards.py",
    "test_golden.py",
    "test_many_devices.py",
    "test_state_machine.py",
)


def pytest_collection_modifyitems(items):
    """Puts those files first; `--no-loadscope-reorder`, in pyproject.toml, leaves it at that."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """After a file's tests their programs may go, before there are too many; the cache on disk has them."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """A small checkpoint with random weights in the published layout."""
    return DATA / "tiny-bagel"


@pytest.fixture(scope="session")
def cases_dir() -> Path:
    """What the official code computes on that checkpoint."""
    return DATA / "cases"


@pytest.fixture(scope="session")
def tiny(tiny_dir) -> Bagel:
    """The small checkpoint, loaded in float32."""
    return Bagel.load(tiny_dir, dtype="float32")


@pytest.fixture
def no_weights(monkeypatch) -> None:
    """Weights must not be loaded: for a real model that takes minutes, after which nobody wants to read an error."""

    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(ModelSource, "load", load)
    monkeypatch.setattr(Bagel, "load_weights", load)
