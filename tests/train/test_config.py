"""Configurations: every error is one sentence that names the file and the field."""

from __future__ import annotations

import math
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from commands import process
from test_imports import SERVING, declared, imported
from training import NEW, tables, write_toml

from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.train import __main__ as command
from bagel_jax.train import packages
from bagel_jax.train.config import OptimizerTable, read_train_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def read(folder, **changes):
    """A small run's configuration, with changes to its tables, as read from a file."""
    return read_train_config(write_toml(folder / "a.toml", tables(folder / "run", ["a.jsonl"], **changes)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_examples_are_valid(path):
    """A command in the README fails before it has begun."""
    config = read_train_config(path)
    assert config.output.startswith("runs/")


def test_fields(tmp_path):
    """A field of the file is read as another, or not at all."""
    sizes = NEW["sizes"]
    changes = {
        "model": {**NEW, "freeze": ["vit", "und_expert"]},
        "objective": {"timestep_shift": 3, "ce_weight": 0.25},
        "lora": {"rank": 4, "projections": ["q", "down"]},
        "optimizer": {"schedule": "cosine", "warmup_steps": 2},
        "mesh": {"fsdp": 2},
        "seed": 7,
    }
    c = read(tmp_path, **changes)
    assert c.model.sizes == BagelConfig.from_dict(sizes)
    assert c.model.freeze == ("vit", "und_expert")
    assert (c.objective.timestep_shift, c.objective.ce_weight, c.objective.mse_weight) == (3.0, 0.25, 1.0)
    assert (c.lora.rank, c.lora.projections, c.lora.experts) == (4, ("q", "down"), ("und", "gen"))
    assert (c.optimizer.schedule, c.optimizer.warmup_steps, c.mesh.fsdp, c.seed) == ("cosine", 2, 2, 7)
    assert c.data.sources[0].path == "a.jsonl"
    assert c.run.steps == 3


def test_defaults_are_the_official_ones():
    """A run that sets nothing is another than the official recipe."""
    o = OptimizerTable()
    assert (o.learning_rate, o.beta1, o.beta2, o.epsilon, o.ema) == (1e-4, 0.9, 0.95, 1e-15, 0.9999)
    assert (o.schedule, o.warmup_steps, o.weight_decay, o.max_grad_norm) == ("constant", 2000, 0.0, 1.0)


TRUNK = NEW["sizes"]["trunk"]
BAD = {
    "an unknown field": ({"run": {"stepz": 3}}, "stepz"),
    "an unknown table": ({"runs": {"steps": 3}}, "runs"),
    "an unknown size": ({"model": {**NEW, "sizes": NEW["sizes"] | {"depth": 3}}}, "depth"),
    "an unknown size further in": (
        {"model": {**NEW, "sizes": NEW["sizes"] | {"trunk": TRUNK | {"depth": 3}}}},
        "depth",
    ),
    "a missing size": ({"model": {**NEW, "sizes": NEW["sizes"] | {"trunk": TRUNK | {"head_dim": None}}}}, "head_dim"),
    "a wrong type": ({"run": {"steps": "many"}}, r"run\.steps"),
    "a fraction of a count": ({"run": {"steps": 1.5}}, r"run\.steps"),
    "a missing field": ({"run": {"steps": None}}, "steps"),
    "a missing table": ({"data": None}, "data"),
    "no output": ({"output": None}, "output"),
    "zero steps": ({"run": {"steps": 0}}, r"run\.steps"),
    "zero rows": ({"data": {"rows": 0}}, r"data\.rows"),
    "no source": ({"data": {"sources": []}}, r"data\.sources"),
    "a source without a path": ({"data": {"sources": [{"weight": 1.0}]}}, r"path.*data\.sources"),
    "a weight of nothing": ({"data": {"sources": [{"path": "a", "weight": 0.0}]}}, r"data\.sources.*weight"),
    "a negative rate": ({"optimizer": {"learning_rate": -1.0}}, r"optimizer\.learning_rate"),
    "an endless rate": ({"optimizer": {"learning_rate": math.inf}}, r"optimizer\.learning_rate"),
    "a rate that is no number": ({"optimizer": {"learning_rate": math.nan}}, r"optimizer\.learning_rate"),
    "a weight that is no number": ({"objective": {"ce_weight": math.nan}}, r"objective\.ce_weight"),
    "an endless shift": ({"objective": {"timestep_shift": math.inf}}, r"objective\.timestep_shift"),
    "an endless weight": ({"data": {"sources": [{"path": "a", "weight": math.inf}]}}, r"data\.sources.*weight"),
    "more than always": ({"objective": {"text_dropout": 1.5}}, r"objective\.text_dropout"),
    "an unknown component": ({"model": {"freeze": ["trunk"]}}, r"model\.freeze"),
    "an unknown projection": ({"lora": {"projections": ["z"]}}, r"lora\.projections"),
    "an unknown objective": ({"objective": {"kind": "gan"}}, r"objective\.kind"),
    "an unknown dtype": ({"run": {"dtype": "float16"}}, r"run\.dtype"),
    "both start and sizes": ({"model": NEW | {"start": "somewhere"}}, r"model\.start.*model\.sizes"),
    "neither start nor sizes": ({"model": {"start": None}}, r"model\.start.*model\.sizes"),
    "no tokenizer": ({"model": NEW | {"tokenizer": None}}, r"model\.tokenizer"),
    "adapters of the autoencoder": ({"objective": {"kind": "autoencoder"}, "lora": {}}, "lora"),
    "all of it warm-up": ({"optimizer": {"schedule": "cosine", "warmup_steps": 3}}, r"optimizer\.warmup_steps is 3"),
}


@pytest.mark.parametrize(("changes", "named"), BAD.values(), ids=BAD.keys())
def test_an_error_names_the_file_and_the_field(tmp_path, changes, named):
    """A typo is ignored, or ends in a traceback after the model has been loaded."""
    with pytest.raises(InputError, match=rf"a\.toml: .*{named}") as raised:
        read(tmp_path, **changes)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path):
    """No file, a folder, other bytes or no TOML end in a traceback."""
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "broken.toml").write_text("output = \n")
    for name, message in {
        "nothing.toml": "cannot be read",
        "": "cannot be read",
        "bytes.toml": "cannot be read",
        "broken.toml": "not valid TOML.*line 1",
    }.items():
        with pytest.raises(InputError, match=message) as raised:
            read_train_config(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)


def test_the_command_says_it_in_one_line(tmp_path):
    """A script cannot tell a typo from a crash, or waits for JAX to be told of it."""
    path = write_toml(tmp_path / "bad.toml", tables(tmp_path / "run", ["a.jsonl"], run={"stepz": 3}))
    ran = process("-X", "importtime", "-m", "bagel_jax.train", path)
    lines = [line for line in ran.stderr.splitlines() if not line.startswith("import time:")]
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {path}: ")
    assert "jax._src" not in ran.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", [["grain"], ["grain", "absl", "tensorboardX"]])
def test_the_command_says_what_to_install(tmp_path, capsys, monkeypatch, missing):
    """Whoever installed the package to serve with it gets a traceback out of the middle of it."""
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    path = write_toml(tmp_path / "a.toml", tables(tmp_path / "run", ["a.jsonl"]))
    assert command.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: training needs ")
    assert all(name in err for name in missing)
    assert err.endswith(" not installed; run pip install -e '.[train]' in the folder of bagel_jax\n")
    assert not (tmp_path / "run").exists()


def test_what_to_install_is_what_is_declared():
    """A package that training needs is neither installed by its extra nor asked for."""
    train = Path(packages.__file__).parent
    third_party = {name for file in train.glob("*.py") for name in imported(file)}
    only = {name for name in third_party if not declared(packages_distributions()[name]) & declared(SERVING)}
    assert only == set(packages._NEEDED)
