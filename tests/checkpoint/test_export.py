"""Exported models: the published layout again, tensor by tensor, and never half of it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import checkpoints
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small
from commands import script_runner
from safetensors import safe_open

from bagel_jax.bagel import Bagel
from bagel_jax.checkpoint.export import export, stored_arrays
from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.checkpoint.load import PublishedCheckpoint
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.checkpoint.store import MANIFEST, convert
from bagel_jax.config import BagelConfig
from bagel_jax.errors import InputError
from bagel_jax.models.weights import Weights, abstract_weights, flatten

SCRIPT = Path(__file__).parents[2] / "scripts" / "export_weights.py"
JSONS = ("config.json", "llm_config.json", "vit_config.json")


def export_directory(source: Path, destination: Path, **kwargs) -> Path:
    opened = ModelSource.open(source)
    export(stored_arrays(opened), opened.config, source, destination, **kwargs)
    return destination


def convert_directory(source: Path, destination: Path) -> Path:
    files = CheckpointFiles(source)
    convert(PublishedCheckpoint(files, read_config(files)), destination)
    return destination


def assert_same_tensors(found: Path, expected: Path, rounded: tuple[type, ...] = ()) -> None:
    """Names, shapes, dtypes and bytes of all tensors; those of `expected` after going through the dtypes `rounded`."""
    for file in checkpoints.FILES.values():
        ours, theirs = checkpoints.read_tensors(found / file), checkpoints.read_tensors(expected / file)
        assert ours.keys() == theirs.keys()
        for name, x in theirs.items():
            for dtype in rounded:
                x = x.astype(dtype)
            assert (ours[name].shape, ours[name].dtype) == (x.shape, x.dtype), name
            assert ours[name].tobytes() == x.tobytes(), name


@pytest.fixture(scope="module")
def exported(tiny_dir, tmp_path_factory) -> Path:
    """tiny-bagel, exported."""
    return export_directory(tiny_dir, tmp_path_factory.mktemp("exported") / "out")


@pytest.fixture
def mixed(tiny_dir, tmp_path) -> Path:
    """tiny-bagel with dtypes as published, bfloat16 and a float32 autoencoder, and one layer norm in float32."""
    directory = checkpoints.copy(tiny_dir, tmp_path / "mixed")
    file = directory / checkpoints.FILES["ema"]
    wide = "language_model.model.norm.weight"
    tensors = {
        name: x if name == wide else x.astype(ml_dtypes.bfloat16) for name, x in checkpoints.read_tensors(file).items()
    }
    checkpoints.write_tensors(file, tensors)
    return directory


def test_published_to_published(exported, tiny_dir):
    """The same tensors, bit for bit, and the tokenizer's files unchanged."""
    assert_same_tensors(exported, tiny_dir)
    assert {p.name for p in exported.iterdir()} == {p.name for p in tiny_dir.iterdir()}
    for path in tiny_dir.iterdir():
        if path.name not in (*JSONS, *checkpoints.FILES.values()):
            assert (exported / path.name).read_bytes() == path.read_bytes()


def test_converted_to_published(mixed, tmp_path):
    """There and back: what was converted can be had again, each tensor in the dtype that it had."""
    converted = convert_directory(mixed, tmp_path / "converted")
    out = export_directory(converted, tmp_path / "out")
    assert_same_tensors(out, mixed)
    assert {p.name for p in out.iterdir()} == {p.name for p in mixed.iterdir()}


def test_mixed_dtypes(mixed, tmp_path):
    """Without a dtype each tensor keeps its own, and the library finds each at a place that its width divides."""
    out = export_directory(mixed, tmp_path / "out")
    assert_same_tensors(out, mixed)
    raw = (out / checkpoints.FILES["ema"]).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    widths = {"F32": 4, "BF16": 2}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            assert (start + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0, name


def test_to_bfloat16(tiny_dir, tmp_path):
    """Rounded once, and said in the json file from which PyTorch takes its dtype."""
    out = export_directory(tiny_dir, tmp_path / "out", dtype=jnp.bfloat16)
    assert_same_tensors(out, tiny_dir, (ml_dtypes.bfloat16,))
    assert json.loads((out / "llm_config.json").read_text())["torch_dtype"] == "bfloat16"


def test_exported_model_loads(exported, tiny):
    """The same sizes, values and images."""
    ours = Bagel.load(exported, dtype="float32")
    assert ours.config == tiny.config
    theirs = flatten(tiny.load_weights()[0].params)
    for path, x in flatten(ours.load_weights()[0].params).items():
        assert np.array_equal(x, theirs[path]), path


def test_what_pytorch_wants(exported):
    """The files say "pt", which Accelerate looks for; and the library reads what was written without it."""
    for file in checkpoints.FILES.values():
        with safe_open(str(exported / file), framework="numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
            expected = checkpoints.read_tensors(exported / file)
            for name in handle.keys():  # noqa: SIM118 (no dict)
                assert np.array_equal(handle.get_tensor(name), expected[name]), name


def test_json_files(exported, tiny_dir):
    """What the official code reads from them, with the one size put right that the source has wrong."""
    for name in JSONS:
        ours, theirs = (json.loads((d / name).read_text()) for d in (exported, tiny_dir))
        assert theirs.keys() <= ours.keys()
        for field, value in theirs.items():
            if field == "vae_config":
                assert value.items() <= ours[field].items()
            else:
                assert ours[field] == (64 if field == "max_latent_size" else value), field


def random_weights(config: BagelConfig) -> Weights:
    abstract = abstract_weights(config, jnp.float32)
    return Weights(abstract.graph, small.drawn(abstract.params))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"autoencoder": {"base_width": 64, "widths": (64, 64, 64), "num_res_blocks": 0, "latent_channels": 8}},
        {"autoencoder": {"widths": (32, 96, 64), "num_res_blocks": 2, "scale_factor": 1.0, "shift_factor": -0.5}},
        {"autoencoder": {"widths": (64,), "num_res_blocks": 1}, "latent_patch_size": 4},
        {"trunk": {"vocab_size": 640, "num_layers": 1, "rope_theta": 500.0, "norm_eps": 1e-5, "head_dim": 16}},
        {"vit": {"patch_size": 8, "num_layers": 1, "norm_eps": 1e-5, "activation": "gelu", "num_positions": 64}},
        {"max_latent_size": 3, "time_frequencies": 256, "interpolate_positions": True, "connector_activation": "relu"},
    ],
    ids=["small", "no blocks", "widths", "one level", "trunk", "vit", "top"],
)
def test_model_from_scratch(tmp_path, change):
    """A model with no json files of its own, of other sizes than any published one: all are found again."""
    parts = {
        name: dataclasses.replace(getattr(small.CONFIG, name), **value) if isinstance(value, dict) else value
        for name, value in change.items()
    }
    config = dataclasses.replace(small.CONFIG, **parts)
    (tmp_path / "tokenizer").mkdir()
    weights = random_weights(config)
    export(weights, config, tmp_path / "tokenizer", tmp_path / "out")
    source = ModelSource.open(tmp_path / "out")
    assert source.config == config
    found = flatten(source.load(jnp.float32).params)
    for path, x in flatten(weights.params).items():
        assert np.array_equal(found[path], x), path


def test_jsons_of_another_model(tiny_dir, tmp_path):
    """The tokenizer may come with the json files of a model of other sizes; the exported model's own win."""
    tokenizer = checkpoints.copy(tiny_dir, tmp_path / "tokenizer")
    top = json.loads((tokenizer / "llm_config.json").read_text())
    checkpoints.edit_json(tokenizer / "config.json", llm_config=top, vit_config={"hidden_size": 1}, note="theirs")
    yarn = {"rope_type": "yarn", "factor": 4.0}
    checkpoints.edit_json(tokenizer / "llm_config.json", rope_scaling=yarn, head_dim=32, note="theirs")
    (tokenizer / MANIFEST).write_text("{}")
    (tokenizer / checkpoints.INDEX).write_text("{}")
    export(small.weights(), small.CONFIG, tokenizer, tmp_path / "out")
    assert ModelSource.open(tmp_path / "out").config == small.CONFIG
    assert not (tmp_path / "out" / checkpoints.INDEX).exists()
    for name in ("config.json", "llm_config.json"):
        fields = json.loads((tmp_path / "out" / name).read_text())
        assert fields["note"] == "theirs"
        assert not {"llm_config", "vit_config", "rope_scaling"} & fields.keys()


def test_progress(tiny_dir, tmp_path):
    """An export of 29 GB shows how far it is, up to all."""
    seen = []
    export_directory(tiny_dir, tmp_path / "out", progress=lambda *event: seen.append(event))
    total = len(stored_arrays(ModelSource.open(tiny_dir)))
    assert seen == [(i + 1, total) for i in range(total)]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_destination_exists(tiny_dir, tmp_path, make):
    """Nobody's directory or file is written over, not even an empty one."""
    make(tmp_path / "out")
    with pytest.raises(InputError, match=f"{tmp_path / 'out'} is there already"):
        export_directory(tiny_dir, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out").is_dir() or list((tmp_path / "out").iterdir()) == []


def assert_interrupted(root: Path, tiny_dir: Path) -> None:
    """Nothing under `root` opens, and an export to the same place succeeds and leaves nothing else."""
    assert [p.name for p in root.iterdir()] == ["out.partial"]
    assert {p.name for p in (root / "out.partial").iterdir()} >= set(checkpoints.FILES.values())  # it had got far
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        Bagel.open(root / "out.partial")
    export_directory(tiny_dir, root / "out")
    assert [p.name for p in root.iterdir()] == ["out"]
    assert_same_tensors(root / "out", tiny_dir)


def test_interrupted_by_an_error(tiny_dir, tmp_path):
    """Ctrl-C, even when all values have been written."""

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_directory(tiny_dir, tmp_path / "out", progress=stop)
    assert_interrupted(tmp_path, tiny_dir)


_KILLED = """
import os, signal, sys
from pathlib import Path
from bagel_jax.checkpoint.export import export, stored_arrays
from bagel_jax.checkpoint.source import ModelSource
source = ModelSource.open(Path(sys.argv[1]))
def kill(done, total):
    if done == total - 10:
        os.kill(os.getpid(), signal.SIGKILL)
export(stored_arrays(source), source.config, source.directory, Path(sys.argv[2]), progress=kill)
"""


def test_killed(tiny_dir, tmp_path):
    """No code runs after a kill, so nothing may depend on cleaning up."""
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tiny_dir), str(tmp_path / "out")], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert_interrupted(tmp_path, tiny_dir)


def test_something_else_in_the_way(tiny_dir, tmp_path):
    """What an interrupted export leaves is cleared away; what only has that name is not."""
    other = checkpoints.copy(tiny_dir, tmp_path / "out.partial")
    with pytest.raises(InputError, match=f"{other} is in the way"):
        export_directory(tiny_dir, tmp_path / "out")
    assert sorted(os.listdir(other)) == sorted(os.listdir(tiny_dir))


def test_disk_full(tmp_path, monkeypatch):
    """29 GB often do not fit; that is said in a sentence."""

    def full(self, mode="r", **kwargs):
        if "w" in mode and self.name == "ema.safetensors":
            raise OSError(28, "No space left on device")
        return open(self, mode, **kwargs)

    (tmp_path / "tokenizer").mkdir()
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(InputError, match=r"ema\.safetensors cannot be written \(No space left on device\)"):
        export(small.weights(), small.CONFIG, tmp_path / "tokenizer", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("trunk.norm.scale", None, "parameter trunk.norm.scale is missing"),
        ("trunk.norm.scale", np.zeros(31, np.float32), r"has shape \[31\]; a model of these sizes needs \[32\]"),
        ("trunk.norm.scale", np.zeros(32, np.int8), "trunk.norm.scale has dtype int8; it must be one of"),
        ("trunk.other", np.zeros(32, np.float32), "parameter trunk.other is unexpected"),
    ],
)
def test_weights_of_another_model(tmp_path, path, value, told):
    """Refused before anything is written."""
    arrays = flatten(small.weights().params) | {path: value}
    arrays = {path: x for path, x in arrays.items() if x is not None}
    with pytest.raises(InputError, match=told):
        export(arrays, small.CONFIG, tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_positions_of_no_square(tmp_path):
    """The official code makes a square table of the image's size; no json file can say another."""
    config = dataclasses.replace(small.CONFIG, vit=dataclasses.replace(small.CONFIG.vit, num_positions=17))
    with pytest.raises(InputError, match="position table has 17 rows"):
        export(random_weights(config), config, tmp_path, tmp_path / "out")


def test_no_tokenizer_directory(tmp_path):
    """Told before anything is written."""
    with pytest.raises(InputError, match="nowhere is not a directory"):
        export(small.weights(), small.CONFIG, tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs the script in this process; returns exit code, stdout and stderr."""
    return script_runner(SCRIPT, monkeypatch, capsys)


def test_script(script, tiny_dir, tmp_path):
    """Exit code 0, the place on stdout, progress on stderr, and the dtype asked for."""
    out = tmp_path / "out"
    code, stdout, stderr = script(tiny_dir, out, "--dtype", "bfloat16")
    assert (code, stdout) == (0, f"wrote {out}\n")
    assert "exporting: 100%" in stderr
    assert_same_tensors(out, tiny_dir, (ml_dtypes.bfloat16,))


def test_script_on_a_tokenizer_that_the_official_code_cannot_load(script, tiny_dir, tmp_path):
    """It takes Qwen2's two files, where this package is content with tokenizer.json."""
    directory = checkpoints.copy(tiny_dir, tmp_path / "model")
    (directory / "merges.txt").unlink()
    code, stdout, _ = script(directory, tmp_path / "out")
    assert code == 0
    assert "note: no merges.txt here" in stdout


def test_script_on_bad_input(script, tiny_dir, tmp_path):
    """Exit code 2 and one sentence that names it; nothing is written."""
    (tmp_path / "there").mkdir()
    bad = checkpoints.copy(tiny_dir, tmp_path / "bad")
    checkpoints.edit_tensors(bad / checkpoints.FILES["ae"], **{"decoder.conv_out.bias": None})
    for args, told in (
        ((tmp_path / "nowhere", tmp_path / "out"), f"{tmp_path / 'nowhere'} is not a directory"),
        ((tiny_dir, tmp_path / "there"), f"{tmp_path / 'there'} is there already"),
        ((bad, tmp_path / "out"), "tensor decoder.conv_out.bias is missing"),
    ):
        code, _, err = script(*args)
        assert code == 2
        assert told in err
    for args in ((tiny_dir,), (tiny_dir, tmp_path / "out", "--dtype", "float16"), (tiny_dir, tmp_path / "out", "--dt")):
        assert script(*args)[0] == 2
    assert {p.name for p in tmp_path.iterdir()} == {"there", "bad"}
