"""Converted checkpoints: the same model, wherever it is moved, and never half of one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import checkpoints
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bagel_jax.bagel import Bagel
from bagel_jax.checkpoint import store
from bagel_jax.checkpoint.export import export, stored_arrays
from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.checkpoint.load import PublishedCheckpoint
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.checkpoint.store import MANIFEST, convert
from bagel_jax.errors import InputError
from bagel_jax.models.weights import Weights, flatten

COMPONENTS = (
    "embedding_and_head",
    "understanding_expert",
    "generation_expert",
    "vit",
    "connectors_and_positions",
    "autoencoder",
)


def published(directory: Path) -> PublishedCheckpoint:
    files = CheckpointFiles(directory)
    return PublishedCheckpoint(files, read_config(files))


def assert_same(weights: Weights, expected: Bagel, rounded: tuple[type, ...] = ()) -> None:
    """Every parameter is that of `expected`, after going through the dtypes `rounded`."""
    ours, expected = (
        {path: np.asarray(x) for path, x in flatten(w.params).items()} for w in (weights, expected.load_weights()[0])
    )
    assert ours.keys() == expected.keys()
    for dtype in rounded:
        expected = {path: x.astype(dtype) for path, x in expected.items()}
    for path, x in expected.items():
        assert ours[path].dtype == x.dtype, path
        assert np.array_equal(ours[path], x), path


@pytest.fixture(scope="module")
def converted(tiny_dir, tmp_path_factory) -> Path:
    """tiny-bagel, converted; its source is gone and the result was moved, so nothing may point to either place."""
    root = tmp_path_factory.mktemp("converted")
    source = checkpoints.copy(tiny_dir, root / "source")
    convert(published(source), root / "here")
    shutil.rmtree(source)
    return (root / "here").rename(root / "there")


@pytest.fixture(scope="module")
def source(tiny_dir) -> PublishedCheckpoint:
    """tiny-bagel, as the script would open it."""
    return published(tiny_dir)


@pytest.fixture
def damaged(converted, tmp_path) -> Path:
    """A copy of the converted checkpoint, to be damaged."""
    return checkpoints.copy(converted, tmp_path / "damaged")


def test_converted_model_is_the_same(tiny, converted):
    """Sizes, values and images, bit for bit; the tokenizer travels along."""
    ours = Bagel.load(converted, dtype="float32")
    assert ours.config == tiny.config
    assert_same(ours.load_weights()[0], tiny)
    arguments = {"height": 96, "width": 160, "steps": 3, "seed": 5}
    theirs = tiny.generate("text2img", "a red square", **arguments)
    result = ours.generate("text2img", "a red square", **arguments)
    assert result.image.size == (160, 96)
    assert np.array_equal(result.latents, theirs.latents)
    assert np.array_equal(np.asarray(result.image), np.asarray(theirs.image))


def test_contents(tiny_dir, converted):
    """One folder a component, and the small files of the source, unchanged; no tensors of it."""
    assert sorted(p.name for p in (converted / "weights").iterdir()) == sorted(COMPONENTS)
    small = {p.name for p in tiny_dir.iterdir()} - set(checkpoints.FILES.values())
    assert {p.name for p in converted.iterdir()} == small | {"weights", MANIFEST}
    for name in small:
        assert (converted / name).read_bytes() == (tiny_dir / name).read_bytes()
    manifest = json.loads((converted / MANIFEST).read_text())
    assert manifest["format"] == 2
    assert set(manifest["dtypes"].values()) == {"float32"}


def test_sharded_source(converted, tiny, tiny_dir, tmp_path):
    """The index of the source would promise files that are not there."""
    directory = checkpoints.copy(tiny_dir, tmp_path / "sharded")
    checkpoints.shard(directory)
    convert(published(directory), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in converted.iterdir()}
    assert ModelSource.open(tmp_path / "out").config == tiny.config


def on_disk(directory: Path) -> dict:
    """What the store itself says of every array: shape, dtype, and `storage.chunk_shape`."""
    found = {}
    for folder in (directory / "weights").iterdir():
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found |= checkpointer.metadata(folder.absolute()).item_metadata.tree
    return found


def test_convert_to_bfloat16(tiny, source, tmp_path):
    """Half the space: bfloat16 on disk, rounded once; in float32 it has the rounded values."""
    convert(source, tmp_path / "out", jnp.dtype("bfloat16"))
    assert set(json.loads((tmp_path / "out" / MANIFEST).read_text())["dtypes"].values()) == {"bfloat16"}
    assert {str(np.dtype(meta.dtype)) for meta in on_disk(tmp_path / "out").values()} == {"bfloat16"}
    assert_same(ModelSource.open(tmp_path / "out").load(jnp.float32), tiny, (ml_dtypes.bfloat16, np.float32))


def test_convert_keeps_dtype(tiny_dir, tmp_path):
    """Without a dtype the published bfloat16 stays bfloat16 and does not double in size."""
    directory = checkpoints.copy(tiny_dir, tmp_path / "source")
    tensors = checkpoints.read_tensors(directory / checkpoints.FILES["ema"])
    halved = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    checkpoints.write_tensors(directory / checkpoints.FILES["ema"], halved)
    convert(published(directory), tmp_path / "out")
    for path, meta in on_disk(tmp_path / "out").items():
        assert np.dtype(meta.dtype).name == ("float32" if path.startswith("autoencoder.") else "bfloat16"), path


def test_arrays_are_stored_in_pieces(tiny, source, tmp_path, monkeypatch):
    """A device reads its part of an array; were arrays one piece each, every device would read all of it."""
    limit = 2**14
    monkeypatch.setattr(store, "_CHUNK_BYTES", limit)
    convert(source, tmp_path / "out")
    arrays = on_disk(tmp_path / "out")
    cut = [path for path, meta in arrays.items() if tuple(meta.shape) != tuple(meta.storage.chunk_shape)]
    assert "trunk.embed.embedding" in cut
    assert "trunk.layers.gen.gate.kernel" in cut
    for path, meta in arrays.items():
        assert 4 * np.prod(meta.storage.chunk_shape) <= limit, path
        assert (path in cut) == (4 * np.prod(meta.shape) > limit), path
    assert_same(ModelSource.open(tmp_path / "out").load(jnp.float32), tiny)


def test_progress(tiny, source, converted, tmp_path):
    """Conversion and load of 29 GB show how far they are, up to all; the load here rounds to bfloat16."""
    seen = []
    convert(source, tmp_path / "out", progress=lambda *event: seen.append(event))
    total = len(source.targets)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    loading = []
    weights = ModelSource.open(converted).load(jnp.bfloat16, lambda *event: loading.append(event))
    assert (loading[0], loading[-1]) == ((0, total), (total, total))
    assert_same(weights, tiny, (ml_dtypes.bfloat16,))


def as_format_1(directory: Path, checkpoint: PublishedCheckpoint) -> None:
    """Rewrites a converted checkpoint as versions before heads were an axis wrote it."""
    targets = {target.path: target for target in checkpoint.targets}
    for folder in (directory / "weights").iterdir():
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            names = checkpointer.metadata(folder.absolute()).item_metadata.tree
            kinds = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
            arrays = checkpointer.restore(folder.absolute(), ocp.args.PyTreeRestore(restore_args=kinds))
        shutil.rmtree(folder)
        arrays = {path: np.asarray(x).reshape(targets[path].joined_shape) for path, x in arrays.items()}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(arrays))
    sizes = {
        file.relative_to(directory).as_posix(): file.stat().st_size
        for file in (directory / "weights").rglob("*")
        if file.is_file()
    }
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(manifest | {"format": 1, "files": sizes}))


@pytest.fixture(scope="module")
def old(converted, source, tmp_path_factory) -> Path:
    """The converted checkpoint in format 1."""
    directory = checkpoints.copy(converted, tmp_path_factory.mktemp("old") / "model")
    as_format_1(directory, source)
    return directory


def test_format_1(old, tiny, tiny_dir, tmp_path):
    """What was converted before heads were an axis still loads, bit for bit, and can be published again."""
    shapes = {path: tuple(meta.shape) for path, meta in on_disk(old).items()}
    t = tiny.config.trunk
    assert shapes["trunk.layers.und.q.kernel"] == (t.num_layers, t.hidden_size, t.num_heads * t.head_dim)
    assert shapes["trunk.layers.und.k.bias"] == (t.num_layers, t.num_kv_heads * t.head_dim)
    opened = ModelSource.open(old)
    assert_same(opened.load(jnp.float32), tiny)
    export(stored_arrays(opened), opened.config, old, tmp_path / "out")
    theirs = checkpoints.read_tensors(tiny_dir / checkpoints.FILES["ema"])
    for name, x in checkpoints.read_tensors(tmp_path / "out" / checkpoints.FILES["ema"]).items():
        assert x.tobytes() == theirs[name].tobytes(), name


_CUT = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.models.weights import flatten
from bagel_jax.placement.rules import sharding
mesh = jax.make_mesh((1, 2), ("data", "fsdp"))
rules = {"heads": "fsdp", "mlp": "fsdp"}
loaded = []
for name in sys.argv[1:]:
    source = ModelSource.open(Path(name))
    loaded.append(flatten(source.load(jnp.float32, None, lambda p, s: sharding(p, s, mesh, rules)).params))
wrong = [path for path, x in loaded[0].items() if not np.array_equal(x, loaded[1][path])]
wrong += [path for path, x in loaded[0].items() if x.sharding != sharding(path, x.shape, mesh, rules)]
cut = [path for path, x in loaded[0].items() if x.addressable_shards[0].data.size < x.size]
print(json.dumps({"wrong": wrong, "cut": cut}))
"""


def test_format_1_on_many_devices(old, converted):
    """Each device reads its heads, whatever the format."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _CUT, str(old), str(converted)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == []
    assert {"trunk.layers.und.q.kernel", "trunk.layers.gen.k.bias", "trunk.layers.gen.o.kernel"} <= set(result["cut"])


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_destination_exists(source, tmp_path, make):
    """Nobody's directory or file is written over, not even an empty one."""
    make(tmp_path / "out")
    with pytest.raises(InputError, match=f"{tmp_path / 'out'} is there already"):
        convert(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out").is_dir() or list((tmp_path / "out").iterdir()) == []


def test_source_that_does_not_fit(tiny_dir, tmp_path):
    """Refused before anything is written."""
    directory = checkpoints.copy(tiny_dir, tmp_path / "source")
    checkpoints.edit_tensors(directory / checkpoints.FILES["ema"], **{"llm2vae.bias": None})
    with pytest.raises(InputError, match=r"llm2vae\.bias is missing"):
        convert(published(directory), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def assert_interrupted(root: Path, source: PublishedCheckpoint, tiny: Bagel) -> None:
    """Nothing under `root` opens, and a conversion to the same place succeeds and leaves nothing else."""
    assert not (root / "out").exists()
    left = [p for p in (root, *root.rglob("*")) if p.is_dir()]
    assert len(left) > 5  # it had got somewhere
    for directory in left:
        with pytest.raises(InputError):
            Bagel.open(directory)
    convert(source, root / "out")
    assert [p.name for p in root.iterdir()] == ["out"]
    assert_same(ModelSource.open(root / "out").load(jnp.float32), tiny)


def test_interrupted_by_an_error(tiny, source, tmp_path):
    """A full disk, or Ctrl-C."""

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=stop)
    assert_interrupted(tmp_path, source, tiny)


_KILLED = """
import os, signal, sys
from pathlib import Path
from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.checkpoint.load import PublishedCheckpoint
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.checkpoint.store import convert
files = CheckpointFiles(Path(sys.argv[1]))
def kill(done, total):
    if done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert(PublishedCheckpoint(files, read_config(files)), Path(sys.argv[2]), progress=kill)
"""


def test_killed(tiny, source, tiny_dir, tmp_path):
    """No code runs after a kill, so nothing may depend on cleaning up."""
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tiny_dir), str(tmp_path / "out")], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert_interrupted(tmp_path, source, tiny)


def test_source_is_never_removed(tiny_dir, tmp_path):
    """What an interrupted conversion leaves is cleared away; a checkpoint that has that name is not."""
    source = checkpoints.copy(tiny_dir, tmp_path / "out.partial")
    checkpoint = published(source)
    with contextlib.suppress(InputError, OSError):
        convert(checkpoint, tmp_path / "out")
    assert sorted(os.listdir(source)) == sorted(os.listdir(tiny_dir))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"format": 2', '"format": 3'),
        lambda text: text.replace('"config"', '"sizes"'),
        lambda text: text.replace('"vocab_size"', '"words"'),
        lambda text: text.replace('"time_frequencies": 256,', ""),
        lambda text: json.dumps(json.loads(text) | {"config": "tiny"}),
        lambda text: text.replace('"hidden_size": 64', '"hidden_size": "64"'),
    ],
    ids=["empty", "cut", "list", "bare", "format", "config", "field", "no field", "text", "text for a number"],
)
def test_damaged_manifest(damaged, change):
    """Told by its name and before anything is loaded."""
    manifest = damaged / MANIFEST
    text = manifest.read_text()
    manifest.write_text(change(text))
    assert manifest.read_text() != text
    with pytest.raises(InputError, match=MANIFEST):
        Bagel.open(damaged)


@pytest.mark.parametrize("folder", COMPONENTS)
def test_missing_component(damaged, folder):
    """A copy that left a folder out."""
    shutil.rmtree(damaged / "weights" / folder)
    with pytest.raises(InputError, match=f"weights/{folder}/.* has 0 bytes; it must have"):
        Bagel.open(damaged)


def _rewrite(old: str, new: str):
    def damage(directory: Path) -> None:
        text = (directory / MANIFEST).read_text()
        assert old in text
        (directory / MANIFEST).write_text(text.replace(old, new))

    return damage


def _remove(pattern: str):
    def damage(directory: Path) -> None:
        victims = list((directory / "weights" / "vit").glob(pattern))
        assert victims
        for path in victims:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def _truncate(directory: Path) -> None:
    largest = max((directory / "weights" / "vit").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def _overwrite(directory: Path) -> None:
    largest = max((directory / "weights" / "vit").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 4 : len(content) // 2] = b"x" * (len(content) // 2 - len(content) // 4)
    largest.write_bytes(content)


# What is damaged, and what must be told.
DAMAGE = {
    "other vocabulary": (_rewrite('"vocab_size": 768', '"vocab_size": 760'), "the embedding and head weights in"),
    "other depth": (_rewrite('"num_layers": 3', '"num_layers": 4'), "the generation expert weights in"),
    "no array files": (_remove("**/d/*"), "weights/vit/"),
    "no index of arrays": (_remove("manifest.ocdbt"), "weights/vit/"),
    "an empty folder": (_remove("*"), "weights/vit/"),
    "a file cut short": (_truncate, "weights/vit/"),
    "other bytes": (_overwrite, "the vit weights in"),
}

_LOAD_ALL = """
import json, sys
from bagel_jax.bagel import Bagel
said = {}
for directory in sys.argv[1:]:
    try:
        Bagel.load(directory)
    except Exception as error:
        said[directory] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def refusals(converted, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """What loading each damaged copy raises, by a process of its own: Orbax's threads outlive its errors."""
    root = tmp_path_factory.mktemp("damage")
    directories = {name: checkpoints.copy(converted, root / name.replace(" ", "-")) for name in DAMAGE}
    for name, directory in directories.items():
        DAMAGE[name][0](directory)
    command = [sys.executable, "-c", _LOAD_ALL, *map(str, directories.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = json.loads(done.stdout.splitlines()[-1])
    return {name: tuple(said.get(str(directory), ("nothing", ""))) for name, directory in directories.items()}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_arrays(refusals, name):
    """A bad copy or another model's manifest: the component is named, and nothing is cut, padded or left at zero."""
    kind, message = refusals[name]
    assert kind == "InputError", message[:200]
    assert DAMAGE[name][1] in message
    assert "convert again" in message
    assert "\n" not in message
