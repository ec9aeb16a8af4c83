"""Which axis of which parameter lies along which devices; nothing here needs more than one."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from checkpoints import write_official
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.errors import InputError
from bagel_jax.models.weights import abstract_weights, flatten
from bagel_jax.placement import mesh as mesh_module
from bagel_jax.placement.mesh import AXES, make_mesh
from bagel_jax.placement.rules import partition


def mesh(data: int, fsdp: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Shapes of the 7B model's parameters by path."""
    files = CheckpointFiles(write_official(tmp_path_factory.mktemp("official") / "model"))
    abstract = abstract_weights(read_config(files), jnp.bfloat16)
    return {path: leaf.shape for path, leaf in flatten(abstract.params).items()}


def test_the_7b_is_cut(published):
    """A large weight lies whole on every device, and the model does not fit."""
    kernels = [path for path in published if path.startswith("trunk.") and path.endswith((".kernel", ".embedding"))]
    assert len(kernels) == 2 * 7 + 2
    for devices in (4, 8, 64):
        cut = mesh(1, devices)
        for path in kernels:
            assert tuple(partition(path, published[path], cut)).count("fsdp") == 1, path
        whole = sum(
            math.prod(shape)
            for path, shape in published.items()
            if "fsdp" not in partition(path, shape, cut) and not path.startswith("autoencoder.")
        )
        assert whole < 0.003 * 14e9  # norms, biases, position tables


def test_layers_are_never_cut(published):
    """The axis that the scan runs over is cut, and every layer's weights travel whole."""
    for path, shape in published.items():
        if ".layers." in path:
            assert partition(path, shape, mesh(1, 4))[:1] in ((), (None,)), path


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("trunk.layers.und.q.kernel", (2, 16, 4, 8), (None, "fsdp", None, None)),
        ("trunk.layers.gen.o.kernel", (2, 4, 8, 16), (None, None, None, "fsdp")),
        ("trunk.layers.gen.down.kernel", (2, 8, 16), (None, None, "fsdp")),
        ("trunk.layers.gen.down.kernel.lora_b", (2, 4, 16), (None, None, "fsdp")),
        ("trunk.layers.gen.v.kernel.lora_a", (2, 16, 4), (None, "fsdp", None)),
        ("trunk.layers.gen.v.kernel.lora_b", (2, 4, 4, 8), (None, None, None, None)),
        ("trunk.layers.gen.o.kernel.lora_a", (2, 4, 8, 4), (None, None, None, None)),
        ("trunk.embed.embedding", (7, 16), (None, "fsdp")),
        ("trunk.layers.und.q.bias", (2, 4, 8), (None, None, None)),
        ("latent_positions.embedding", (16, 16), (None, None)),
    ],
)
def test_axes(path, shape, expected):
    """A weight is cut along another axis than the model's width."""
    assert partition(path, shape, mesh(1, 4)) == PartitionSpec(*expected)


def test_an_axis_that_does_not_divide_is_not_cut():
    """A width that the number of devices does not divide ends in a traceback of XLA's."""
    path = "trunk.layers.und.q.kernel"
    assert partition(path, (2, 18, 4, 8), mesh(1, 4)) == PartitionSpec(None, None, None, None)
    assert partition(path, (2, 18, 4, 8), mesh(4, 2)) == PartitionSpec(None, "fsdp", None, None)


HEADS = {"embed": None, "heads": "fsdp", "mlp": None, "vocab": None}


@pytest.mark.parametrize("devices", [2, 4, 7, 8, 28, 128])
def test_heads_are_cut_whole_or_not_at_all(published, devices):
    """A device holds half a head: its rotary pairs lie on two devices. The 7B has 28 heads and 4 of keys and values."""
    cut, width = mesh(1, devices), 128
    for expert in ("und", "gen"):
        for name, heads in {"q": 28, "k": 4, "v": 4, "o": 28}.items():
            path = f"trunk.layers.{expert}.{name}"
            axis = "fsdp" if heads % devices == 0 else None
            kernel = (None, axis, None, None) if name == "o" else (None, None, axis, None)
            assert partition(f"{path}.kernel", published[f"{path}.kernel"], cut, HEADS) == PartitionSpec(*kernel)
            if name == "o":
                adapter, shape, expected = "lora_a", (28, heads, width, 8), (None, axis, None, None)
            else:
                assert partition(f"{path}.bias", published[f"{path}.bias"], cut, HEADS)[1:] == (axis, None)
                adapter, shape, expected = "lora_b", (28, 8, heads, width), (None, None, axis, None)
            assert partition(f"{path}.kernel.{adapter}", shape, cut, HEADS) == PartitionSpec(*expected)


def test_no_rule_reaches_into_a_head(published):
    """Whatever the rules say, the axis of a head's numbers has no name that one could cut."""
    for rules in ({name: "fsdp"} for name in ("embed", "heads", "mlp", "vocab")):
        for path, shape in published.items():
            spec = tuple(partition(path, shape, mesh(1, 2), rules))
            if path.startswith("trunk.layers.") and path.split(".")[-2] in ("q", "k", "v", "o"):
                width = -2 if path.endswith(".o.kernel") else -1
                assert shape[width] == 128
                assert spec[width] is None, path


def test_other_rules():
    """Tensor parallelism needs other networks; or rules that cannot be are taken silently."""
    path, shape = "trunk.layers.und.q.kernel", (2, 16, 4, 8)
    tensor = {"embed": "data", "heads": "fsdp", "mlp": "fsdp", "vocab": "fsdp"}
    assert partition(path, shape, mesh(2, 4), tensor) == PartitionSpec(None, "data", "fsdp", None)
    with pytest.raises(ValueError, match=r"und\.q\.kernel along mesh axis 'fsdp'"):
        partition(path, shape, mesh(2, 4), {"embed": "fsdp", "heads": "fsdp"})
    # Not where one of the two is not cut after all.
    assert partition(path, (2, 18, 4, 8), mesh(2, 4), {"embed": "fsdp", "heads": "fsdp"})[1:] == (None, "fsdp", None)


@pytest.mark.parametrize(
    ("data", "fsdp", "expected"), [(1, 0, (1, 8)), (0, 0, (8, 1)), (0, 4, (2, 4)), (2, 0, (2, 4)), (8, 1, (8, 1))]
)
def test_a_mesh_uses_all_devices(data, fsdp, expected, monkeypatch):
    """Devices stand idle, or 0 does not mean the rest."""
    eight = jax.devices() * 8
    monkeypatch.setattr(mesh_module.jax, "device_count", lambda: 8)
    monkeypatch.setattr(mesh_module.jax, "devices", lambda: eight)
    monkeypatch.setattr(mesh_module, "Mesh", lambda devices, axes: (devices.shape, axes))
    assert make_mesh(data, fsdp) == (expected, ("data", "fsdp"))


@pytest.mark.parametrize(("data", "fsdp"), [(3, 0), (2, 2), (16, 0), (0, 3), (1, 16)])
def test_a_mesh_that_does_not_fit_is_named(data, fsdp, monkeypatch):
    """A mesh for another machine ends in a traceback."""
    monkeypatch.setattr(mesh_module.jax, "device_count", lambda: 8)
    with pytest.raises(InputError, match=rf"mesh is data {data} .*8 devices|mesh is .* fsdp {fsdp}, .*8 devices"):
        make_mesh(data, fsdp)
