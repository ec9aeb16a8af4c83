"""A run that was killed goes on as if it had not been; one that is another says so."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import process
from training import SIX_STEPS, TINY, scalars, tiny_checkpoint, write_config

from bagel_jax.train import __main__ as command
from bagel_jax.train.loop import train

# `python -c KILLED CONFIG`: the command line, killed in its fifth step, when the third is saved.
KILLED = """
import os, signal, sys
from bagel_jax.train import __main__ as command
from bagel_jax.train.checkpoints import TrainCheckpoints
due = TrainCheckpoints.due
def killed(self, step, **options):
    if step == 5:
        self._manager.wait_until_finished()
        os.kill(os.getpid(), signal.SIGKILL)
    return due(self, step, **options)
TrainCheckpoints.due = killed
command.main([sys.argv[1], "--quiet"])
"""


def data_position(output: Path) -> str:
    """Where the last checkpoint says that the data stands."""
    latest = max((path for path in (output / "checkpoints").iterdir()), key=lambda path: int(path.name))
    return "".join(path.read_text() for path in sorted((latest / "data").glob("*.json")))


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, six_steps):
    """After a preemption the model is another one: moments, average, noise or data start anew."""
    c, path = write_config(tmp_path, **SIX_STEPS)
    ran = process("-c", KILLED, path)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    output = Path(c.output)
    assert max(int(name.name) for name in (output / "checkpoints").iterdir()) == 3
    state = train(c, path, quiet=True)
    ours, theirs = (dict(jax.tree_util.tree_leaves_with_path(s)) for s in (state, six_steps.state))
    assert set(ours) == set(theirs)
    assert {array.dtype for array in ours.values()} == {np.dtype("float32"), np.dtype("int32")}
    differ = [jax.tree_util.keystr(name) for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert differ == []
    # The configurations differ in their folders alone.
    assert data_position(output).replace(str(tmp_path), "") == data_position(six_steps.output).replace(
        str(six_steps.folder), ""
    )
    assert set(scalars(output / "metrics")["loss"]) == {4, 5, 6}  # the killed run's went with it


def test_a_finished_run_stays_as_it_is(six_steps):
    """The same command once more trains on, or fails."""
    c, path = write_config(six_steps.folder, **SIX_STEPS)
    again = train(c, path, quiet=True)
    assert int(again.step) == 6
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(six_steps.state), strict=True):
        np.testing.assert_array_equal(a, b)


WIDER = dataclasses.replace(TINY, trunk=dataclasses.replace(TINY.trunk, mlp_width=32))
OTHERS = {
    "a part frozen": (
        lambda: {"model": {"start": str(tiny_checkpoint()), "freeze": ["vit"]}},
        r"vit\..* and this configuration trains it not at all",
    ),
    "another width": (
        lambda: {"model": {"start": str(tiny_checkpoint(WIDER))}},
        r"with shape \[2, 24, 16\].* with shape \[2, 32, 16\]",
    ),
    "adapters": (lambda: {"lora": {"rank": 2}}, "use another output folder"),
    "the autoencoder": (lambda: {"objective": {"kind": "autoencoder"}}, "use another output folder"),
    "worker processes": (lambda: {"data": {"workers": 1}}, r"data\.workers"),
}


@pytest.mark.parametrize(("changes", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_another_configuration_in_the_same_folder_is_refused(changes, message, six_steps, tmp_path, capsys):
    """A checkpoint of another model ends in a traceback, or the run's own configuration is lost."""
    shutil.copytree(six_steps.output, tmp_path / "run")
    before = (tmp_path / "run" / "config.toml").read_text()
    _, path = write_config(tmp_path, **(SIX_STEPS | changes()))
    capsys.readouterr()
    assert command.main([str(path), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the training checkpoint 6 in ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert (tmp_path / "run" / "config.toml").read_text() == before


def test_what_is_not_finite_is_not_saved(tmp_path):
    """The same command would go on from it for ever; between two reports nothing else looks."""
    changed = {"run": {"steps": 6, "save_every": 3, "log_every": 1000}, "optimizer": {"learning_rate": 1e30}}
    changed["optimizer"]["warmup_steps"] = 0
    c, path = write_config(tmp_path, **(SIX_STEPS | changed))
    with pytest.raises(FloatingPointError, match="at step 3 the loss is not finite"):
        train(c, path, quiet=True)
    assert not [folder for folder in (Path(c.output) / "checkpoints").iterdir() if folder.name.isdigit()]
