"""Loading onto another device than the first."""

from __future__ import annotations

from commands import process

from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.checkpoint.store import convert

THREE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

# `python -c SCRIPT DIR...`: loads each onto device 2 in every way; says where arrays lay, of all that were ever made.
# The stages are on devices 2 and 1.
SCRIPT = """
import functools, sys
from pathlib import Path
import jax, jax.numpy as jnp
from bagel_jax.models import weights as models
models.abstract_weights = functools.cache(models.abstract_weights)  # as in conftest.py
from bagel_jax.bagel import Bagel
from bagel_jax.checkpoint.load import on_device
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.models.weights import Weights
from bagel_jax.settings import EngineConfig

device, seen = jax.devices()[2], set()

def look(*_):
    seen.update(d.id for array in jax.live_arrays() for d in array.devices())

for name in sys.argv[1:]:
    source = ModelSource.open(Path(name))
    weights = source.load(jnp.bfloat16, look, on_device(device))
    assert weights.device == device
    look()
    Weights.better_unrolled = property(lambda self: True)
    apart = weights.for_serving(source.config, jnp.bfloat16)
    assert apart.device == device and len(apart.arrays) > len(weights.arrays)
    look()
    model = Bagel(source, settings=EngineConfig(ar_device=2, dit_device=1))
    assert [w.device.id for w in model.load_weights(look)] == [2, 1]
    assert {d.id for d in model.engine.engine.context.store.pages.devices()} == {2}
    look()
print(sorted(seen))
"""


def test_weights_go_straight_to_their_device(tiny_dir, tmp_path):
    """A 7B model for the second GPU needs the memory of the first one too, where another may be at work."""
    convert(ModelSource.open(tiny_dir).checkpoint, tmp_path / "converted")
    done = process("-c", SCRIPT, tiny_dir, tmp_path / "converted", **THREE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "[1, 2]\n"
