"""Loading onto many devices: every part is read once, lies where it belongs, and passes through little host memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
from commands import process

from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.checkpoint.store import convert

# Some functions that the programs below share.
COMMON = """
import contextlib, functools, json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from bagel_jax.models import weights as models
models.abstract_weights = functools.cache(models.abstract_weights)  # as in conftest.py
from bagel_jax.checkpoint import assemble as assembling, load, store
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.models.weights import Weights, flatten
from bagel_jax.placement.placement import Placement

def placed(source, tensor, data=1):
    "Where each parameter goes on a mesh of the first devices."
    devices = jax.devices()[: data * tensor]
    return Placement.over(devices, source.config.trunk.num_kv_heads, data=data, tensor=tensor).parameter

def count_reads(source):
    "Numbers read from now on, in a list: of the files' tensors, or of stored arrays."
    numbers = []
    def counted(read):
        def count(*args):
            part = read(*args)
            numbers.append(part.size)
            return part
        return count
    if isinstance(source.checkpoint, store.ConvertedCheckpoint):
        store.assemble = lambda *args, **how: assembling.assemble(*args[:-1], counted(args[-1]), **how)
    else:
        reading = source.checkpoint.files.reading
        @contextlib.contextmanager
        def counting():
            with reading() as read:
                yield counted(read)
        source.checkpoint.files.reading = counting
    return numbers

def parts(x):
    "How many different numbers the devices keep of an array."
    return sum({str(shard.index): shard.data.size for shard in x.addressable_shards}.values())

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name + ":"))
"""

# `python -c COUNTED PIECE DIR...`: loads each onto meshes of many shapes; prints what was wrong.
COUNTED = (
    COMMON
    + """
assembling._PIECE_BYTES = int(sys.argv[1])
wrong, cut = [], {}
for name in sys.argv[2:]:
    source = ModelSource.open(Path(name))
    whole = {path: np.asarray(x) for path, x in flatten(source.load(jnp.float32).params).items()}
    numbers = count_reads(source)
    for tensor, data in ((3, 1), (6, 1), (4, 2)):
        where = placed(source, tensor, data)
        for target in source.checkpoint.targets:
            numbers.clear()
            x = source.checkpoint.read(target, jnp.float32, where(target.path, target.shape))
            good = x.sharding == where(target.path, target.shape) and np.array_equal(x, whole[target.path])
            if not good or sum(numbers) != parts(x) or parts(x) != x.size:
                wrong.append([name, tensor, data, target.path, sum(numbers), parts(x), x.size])
            cut[tensor] = cut.get(tensor, 0) + (x.addressable_shards[0].data.size < x.size)
print(json.dumps({"wrong": wrong, "cut": cut}))
"""
)

# `python -c MEMORY DIR`: loads it onto eight devices and takes its layers apart; prints bytes.
MEMORY = (
    COMMON
    + """
source = ModelSource.open(Path(sys.argv[1]))
jax.block_until_ready(jnp.zeros(8) + 1)
before = memory("VmRSS")
weights = source.load(jnp.bfloat16, sharding=placed(source, 8))
def held(weights):
    return sum(shard.data.nbytes for x in weights.arrays for shard in x.addressable_shards)
loaded = {"shards": held(weights), "peak": memory("VmHWM"), "before": before}
first = sum(x.addressable_shards[0].data.nbytes for x in weights.arrays)
apart = weights.for_serving(source.config, jnp.bfloat16)
same = {path: x.sharding == placed(source, 8)(path, x.shape) for path, x in flatten(apart.params).items()}
loaded |= {"first": first, "apart": held(apart), "peak apart": memory("VmHWM")}
loaded["wrong"] = [path for path, good in same.items() if not good]
print(json.dumps(loaded))
"""
)

# `python -c FULL DIR`: reads each parameter of the published model, and lets go of it again; prints what was wrong.
FULL = (
    COMMON
    + """
source = ModelSource.open(Path(sys.argv[1]))
numbers, wrong, a_device, largest = count_reads(source), [], 0, 0
where = placed(source, 8)
for target in source.checkpoint.targets:
    numbers.clear()
    x = source.checkpoint.read(target, jnp.bfloat16, where(target.path, target.shape))
    a_device += x.addressable_shards[0].data.nbytes
    largest = max(largest, sum(shard.data.nbytes for shard in x.addressable_shards))
    if sum(numbers) != x.size or parts(x) != x.size:
        wrong.append([target.path, sum(numbers), parts(x), x.size])
    x.delete()
print(json.dumps({"wrong": wrong, "device": a_device, "largest": largest, "peak": memory("VmHWM")}))
"""
)

SCRIPTS = Path(__file__).parents[2] / "scripts"
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def models(tiny_dir, tmp_path_factory) -> list[Path]:
    """tiny-bagel, as published and converted."""
    folder = tmp_path_factory.mktemp("models") / "converted"
    convert(ModelSource.open(tiny_dir).checkpoint, folder)
    return [tiny_dir, folder]


def told(*args: object) -> dict:
    """What a program on eight devices prints at its end."""
    done = process("-c", *args, **EIGHT, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("piece", [2**29, 2**10], ids=["whole", "in pieces"])
def test_every_part_is_read_once(models, piece):
    """Devices that keep the same read it once each; on three or six devices, parts are torn or read twice."""
    result = told(COUNTED, piece, *models)
    assert result["wrong"] == []
    assert all(result["cut"][tensor] for tensor in "346"), result["cut"]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Iterator[list[Path]]:
    """8.1 GB with the published widths, as published and converted; what takes so much room goes afterwards."""
    folder = tmp_path_factory.mktemp("large")
    disk, memory = shutil.disk_usage(folder).free, _free_memory()
    if disk < 25e9 or memory < 16e9:
        pytest.skip(f"{disk / 1e9:.0f} GB of disk and {memory / 1e9:.0f} GB of memory are free; it takes 25 and 16")
    sizes = "--published", "--repeat", "--layers", 6, "--vit-layers", 2, "--dtype", "bfloat16"
    for command in (("random_weights.py", folder / "published", *sizes), ("convert_weights.py", folder / "published")):
        script, *options = command
        options += [folder / "converted"] if script.startswith("convert") else []
        done = process(SCRIPTS / script, *options, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    yield [folder / "published", folder / "converted"]
    shutil.rmtree(folder)


def _free_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.slow
@pytest.mark.parametrize("form", [0, 1], ids=["published", "converted"])
def test_memory_of_the_host(large, form):
    """A host needs the memory of the model beside that of its devices: no TPU VM has it for its slice."""
    result = told(MEMORY, large[form])
    assert result["peak"] - result["shards"] < 2e9
    assert result["wrong"] == []
    assert result["apart"] == result["shards"]
    assert result["peak apart"] - result["peak"] < 1e8  # layers are views


@pytest.mark.slow
@pytest.mark.by_hand
def test_full_size(tmp_path):
    """Of 29 GB a device reads what is another's, or what it has already; and the host holds a parameter whole."""
    result = told(FULL, checkpoints.write_official(tmp_path / "model"))
    assert result["wrong"] == []
    assert result["peak"] - result["largest"] < 2e9
