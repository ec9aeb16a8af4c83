"""Shared by all tests: the small checkpoint, its golden cases, and where compiled programs are kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# One cache of compiled programs for the whole run, command lines started by tests included; not the user's own.
_XLA_CACHE = tempfile.TemporaryDirectory(prefix="bagel_jax_xla_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _XLA_CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Pallas' interpreter of Mosaic GPU blocks a thread of XLA's CPU client for each warpgroup.
os.environ.setdefault("PJRT_NPROC", "8")

import pytest  # noqa: E402

from bagel_jax.engine import Bagel  # noqa: E402

DATA = Path(__file__).parent / "data"


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
