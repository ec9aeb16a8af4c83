"""Loading onto many devices: every part is read once, lies where it belongs, and passes through little host memory."""

from __future__ import annotations

import json
from pathlib import Path

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
from bagel_jax.placement.placement import AXES
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from bagel_jax.placement.rules import SERVING, partition

def parameter_over(tensor, data=1):
    mesh = Mesh(np.array(jax.devices()[:data * tensor]).reshape(data, 1, tensor), AXES)
    return lambda path, shape: NamedSharding(mesh, partition(path, shape, mesh, SERVING))

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
        assemble = assembling.assemble
        store.assemble = lambda shape, dtype, sharding, read, **how: assemble(shape, dtype, sharding, counted(read), **how)
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
    for tensor, data in ((2, 1), (3, 1), (6, 1), (3, 2), (8, 1)):
        where = parameter_over(tensor, data)
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

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def models(tiny_dir, tmp_path_factory) -> list[Path]:
    """tiny-bagel, as published and converted."""
    folder = tmp_path_factory.mktemp("models") / "converted"
    convert(ModelSource.open(tiny_dir).checkpoint, folder)
    return [tiny_dir, folder]


def told(*args: object) -> dict:
    """What a program on eight devices prints at its end."""
    done = process("-c", *args, **EIGHT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("piece", [2**29, 2**10], ids=["whole", "in pieces"])
def test_every_part_is_read_once(models, piece):
    """Devices that keep the same read it once each; on three or six devices, parts are torn or read twice."""
    result = told(COUNTED, piece, *models)
    assert result["wrong"] == []
    assert all(result["cut"][tensor] for tensor in "236"), result["cut"]
