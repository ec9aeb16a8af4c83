"""Runs on eight devices, which XLA makes out of one CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
from commands import process
from training import scalars, tables, write_data, write_toml

from bagel_jax.train.config import read_train_config
from bagel_jax.train.loop import train
from bagel_jax.train.result import export_run

# Compiled in half the time, for they run for milliseconds.
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
MESHES = {"data": (8, 1), "fsdp": (1, 8), "both": (2, 4)}

# `python -c SCRIPT CONFIG...`: runs them; prints for each the shapes of some arrays, whole and on the first device.
SCRIPT = """
import json, sys
from pathlib import Path
import optax
from bagel_jax.train.config import read_train_config
from bagel_jax.train.loop import train
for name in sys.argv[1:]:
    state = train(read_train_config(Path(name)), Path(name), quiet=True)
    kinds = {"trainable": state.trainable, "ema": state.ema}
    kinds |= {kind: optax.tree.get(state.optimizer, kind) for kind in ("mu", "nu")}
    paths = "trunk.layers.und.q.kernel", "trunk.embed.embedding", "trunk.layers.gen.q.bias"
    arrays = {f"{kind} {path}": tree[path] for kind, tree in kinds.items() for path in paths}
    print(json.dumps({name: [x.shape, x.addressable_shards[0].data.shape] for name, x in arrays.items()}))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`{mesh: (output folder, shapes)}`, and one device's run as `None`; eight rows, three steps."""
    folder = tmp_path_factory.mktemp("runs")
    sources = list(write_data(folder / "data"))

    def config(name, **mesh):
        table = tables(
            folder / name,
            sources,
            mesh=mesh,
            data={"rows": 8, "cache": str(folder / "latents")},
            optimizer={"accumulate": 2},
        )
        return write_toml(folder / f"{name}.toml", table)

    alone = config("alone")
    train(read_train_config(alone), alone, quiet=True)
    files = [config(name, data=data, fsdp=fsdp) for name, (data, fsdp) in MESHES.items()]
    ran = process("-c", SCRIPT, *files, **EIGHT)
    assert ran.returncode == 0, ran.stderr[-3000:]
    shapes = dict(zip(MESHES, map(json.loads, ran.stdout.splitlines()), strict=True))
    return {"alone": (folder / "alone", {})} | {name: (folder / name, shapes[name]) for name in MESHES}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_losses_are_those_of_one_device(runs, name):
    """A model learns something else on eight devices than on one: rows are lost, or gradients summed twice."""
    ours, theirs = (scalars(runs[which][0] / "metrics") for which in (name, "alone"))
    assert set(theirs["loss"]) == {1, 2, 3}
    for scalar in ("loss", "ce", "mse", "grad_norm"):
        for step, value in theirs[scalar].items():
            assert ours[scalar][step] == pytest.approx(value, rel=2e-5), (scalar, step)
    assert theirs["loss"][3] != pytest.approx(theirs["loss"][1], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parts"), [("data", 1), ("fsdp", 8), ("both", 4)])
def test_parameters_and_what_goes_with_them_are_cut(runs, name, parts):
    """Weights, average or moments lie whole on each device, and the model does not fit."""
    for array, (whole, part) in runs[name][1].items():
        expected = 1 if array.endswith("bias") else parts
        assert np.prod(whole) / np.prod(part) == expected, array


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_is_for_one_too(runs, tmp_path):
    """A run from a large machine cannot be exported or gone on with on a small one."""
    folder = runs["fsdp"][0]
    assert (export_run(folder) / "ema.safetensors").stat().st_size > 0
    text = (folder / "config.toml").read_text()
    longer = tmp_path / "longer.toml"
    longer.write_text(text.replace("fsdp = 8", "fsdp = 0").replace("steps = 3", "steps = 4"))
    state = train(read_train_config(longer), longer, quiet=True)
    assert int(state.step) == 4
    assert set(scalars(folder / "metrics")["loss"]) == {1, 2, 3, 4}


@pytest.mark.slow
def test_rows_that_do_not_divide_are_named(tmp_path):
    """Six rows on eight devices end in a traceback of XLA's."""
    table = tables(tmp_path / "run", list(write_data(tmp_path / "data")), data={"rows": 6})
    ran = process("-m", "bagel_jax.train", write_toml(tmp_path / "a.toml", table), **EIGHT)
    assert ran.returncode == 2
    assert ran.stderr == "error: data.rows is 6; it must be a multiple of the 8 devices\n"
