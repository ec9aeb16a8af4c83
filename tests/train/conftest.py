"""Whole runs that several tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from training import SIX_STEPS, write_config

from bagel_jax.train.loop import train
from bagel_jax.train.step import TrainState


class Run(NamedTuple):
    """A run that went to its end."""

    folder: Path  # of the configuration and the data
    output: Path
    state: TrainState  # the last one


@contextmanager
def compiled_quickly() -> Iterator[None]:
    """Programs that run for milliseconds are compiled in half the time, here and in processes that tests start."""
    before = jax.config.read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """For all tests here."""
    with compiled_quickly():
        yield


@pytest.fixture(scope="session")
def six_steps(tmp_path_factory) -> Run:
    """Six steps without a break."""
    folder = tmp_path_factory.mktemp("six")
    c, path = write_config(folder, **SIX_STEPS)
    with compiled_quickly():
        return Run(folder, Path(c.output), train(c, path, quiet=True))
