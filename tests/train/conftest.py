"""Whole runs that several tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from training import SIX_STEPS, write_config

from bagel_jax.train.loop import train
from bagel_jax.train.step import TrainState


class Run(NamedTuple):
    """A run that went to its end."""

    folder: Path  # of the configuration and the data
    output: Path
    state: TrainState  # the last one


@pytest.fixture(scope="session")
def six_steps(tmp_path_factory) -> Run:
    """Six steps without a break."""
    folder = tmp_path_factory.mktemp("six")
    c, path = write_config(folder, **SIX_STEPS)
    return Run(folder, Path(c.output), train(c, path, quiet=True))
