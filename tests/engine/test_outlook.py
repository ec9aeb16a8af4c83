"""A verdict from sizes alone: what fits, with what, and what would fit."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write_official
from commands import Cli, assert_refused
from jax.sharding import AbstractMesh, AxisType

from bagel_jax.bagel import Bagel
from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.engine import outlook as module
from bagel_jax.engine.outlook import outlook, temporaries, weights_a_device
from bagel_jax.errors import InputError
from bagel_jax.placement.placement import Placement
from bagel_jax.placement.spread import AXES
from bagel_jax.settings import EngineConfig

GIB = 2**30
SETTINGS = EngineConfig()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Sizes of the 7B model."""
    return read_config(CheckpointFiles(write_official(tmp_path_factory.mktemp("official") / "model")))


def mesh(data: int = 1, sequence: int = 1, tensor: int = 1) -> AbstractMesh:
    heads = math.gcd(tensor, 4)
    return AbstractMesh((data, sequence, heads, tensor // heads), AXES, axis_types=(AxisType.Auto,) * 4)


class Elsewhere:
    """The mesh of a placement whose devices are not here."""

    def __init__(self, **axes: int):
        found = mesh(**axes)
        self.shape, self.size, self.devices = found.shape, found.size, np.arange(found.size)


class Far(Placement):
    """A placement on devices that have so much memory."""

    def __init__(self, memory: float, **axes: int):
        super().__init__(Elsewhere(**axes))
        object.__setattr__(self, "free", int(memory * GIB))

    def memory(self) -> int:
        return self.free


def judged(config, memory: float, settings=SETTINGS, **axes: int):
    """The outlook of both stages on a mesh of devices with so much memory in GiB."""
    place = Far(memory, **axes)
    return outlook((place, place), config, settings, jnp.bfloat16)


def test_weights_of_the_7b(published):
    """A device is promised less than it gets: the biases, the ViT and the autoencoder lie on all of them."""
    assert weights_a_device(published, jnp.bfloat16, mesh()) / GIB == pytest.approx(27.36, abs=0.01)
    # What libtpu was given as arguments.
    for axes, given in (({"tensor": 4}, 7.25), ({"data": 2, "tensor": 2}, 13.95), ({"data": 2, "tensor": 4}, 7.25)):
        assert weights_a_device(published, jnp.bfloat16, mesh(**axes)) / GIB == pytest.approx(given, abs=0.01), axes


def test_weights_are_those_that_are_loaded(tiny):
    """The verdict counts otherwise than the loader."""
    held = sum(x.nbytes for x in tiny.load_weights()[0].arrays)
    assert weights_a_device(tiny.config, tiny.dtype, tiny.placements[0].mesh) == held


# GiB that compilers gave to the programs of 1024² images, six rows of them: mesh, denoising, decoder.
COMPILED = {
    "v6e-1": ({}, 3.15, 2.78),
    "v6e-4": ({"data": 2, "tensor": 2}, 0.73, 0.58),
    "v5e-4": ({"tensor": 4}, 1.13, 0.77),
    "v5e-8": ({"data": 2, "tensor": 4}, 0.37, 0.27),
    "v5p-8": ({"data": 4}, 1.57, 0.78),
    "h100": ({}, 2.25, 1.00),
}


@pytest.mark.parametrize("name", COMPILED)
def test_the_rule_lies_above_what_compilers_say(published, name):
    """Images are promised that end in an error of the device, hours into a run; or none is, though there is room."""
    axes, *compiled = COMPILED[name]
    told = temporaries(mesh(**axes), published, SETTINGS, jnp.bfloat16, 1024) / GIB
    assert max(compiled) <= told + 0.005
    assert told < max(compiled) + 1.1


def test_a_mesh_that_fits(published):
    """One line says what a user wants to know."""
    told = judged(published, 15.75, tensor=4)
    assert (
        str(told) == "27.4 GiB of weights over 4 devices (tensor=4), 7.2 GiB each; 1,780 pages; images up to 1024x1024"
    )
    assert judged(published, 15.75, data=2, tensor=4).share == told.share


def test_fewer_images_than_the_model_could_draw(published):
    """Nobody is told that memory is short before it is gone."""
    one = judged(published, 31.25)
    assert one.image == 0
    assert str(one).startswith("27.4 GiB of weights over one device; ")
    assert "GiB are left for programs, which may be too little for images: give another num_pages" in str(one)
    assert 0 < judged(published, 36, EngineConfig(dit_max_num_seqs=1, num_pages=500)).image <= 1024


@pytest.mark.parametrize(
    ("memory", "axes", "dtype", "message"),
    [
        (
            15.75,
            {},
            jnp.bfloat16,
            "the model's weights take 27.4 GiB in bfloat16 and the device has 15.8 GiB; give --mesh tensor=4 on as "
            "many devices, of which there are 1",
        ),
        (
            7.0,
            {"tensor": 2},
            jnp.bfloat16,
            "the model's weights take 27.4 GiB in bfloat16, 14.0 GiB a device of this mesh, and the device has "
            "7.0 GiB; give --mesh tensor=8 on as many devices, of which there are 1",
        ),
        (0.25, {}, jnp.bfloat16, "no mesh of up to 64 such devices holds them, so take larger ones"),
        (31.25, {}, jnp.float32, "54.7 GiB in float32 and the device has 31.2 GiB; give --dtype bfloat16, or give "),
    ],
)
def test_what_would_fit(published, memory, axes, dtype, message):
    """A user who has the devices, but not the flag, is told only that memory is gone."""
    place = Far(memory, **axes)
    with pytest.raises(InputError) as refused:
        outlook((place, place), published, SETTINGS, dtype)
    assert message in str(refused.value)


def test_a_mesh_of_devices_that_are_there(published, monkeypatch):
    """The one who has them is told that they are missing."""
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(InputError, match=r"15\.8 GiB; give --mesh tensor=4 or more devices$"):
        judged(published, 15.75)
    assert judged(published, 15.75, tensor=4).image == 1024


def test_weights_that_leave_no_room_for_pages(published):
    """The weights are read for minutes before the engine says that there is no room for its cache."""
    with pytest.raises(InputError, match="bytes left for the KV cache, and a page of 64 tokens takes"):
        judged(published, 27.37)


def test_pages_for_smaller_images(published):
    """An image is promised whose blocks have no pages, or none, where smaller ones would fit."""
    config = EngineConfig(dit_max_num_seqs=1)
    fewer = EngineConfig(dit_max_num_seqs=1, num_pages=200)
    assert judged(published, 80, config).image == 1024
    assert 512 <= judged(published, 80, fewer).image < 1024
    assert judged(published, 80, EngineConfig(num_pages=30)).image == 0


def test_two_meshes_on_the_same_devices(published):
    """The weights lie there twice, once for each stage."""
    places = Far(12, tensor=4), Far(12, data=2, tensor=2)
    with pytest.raises(InputError, match=r"21\.2 GiB a device of this mesh, and the device has 12"):
        outlook(places, published, SETTINGS, jnp.bfloat16)


@pytest.fixture
def unread(monkeypatch):
    """A checkpoint may be opened, but not read."""

    def load(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(ModelSource, "load", load)


@pytest.mark.usefixtures("unread")
def test_nothing_is_read_when_refused(tiny_dir, monkeypatch, tmp_path, capsys):
    """29 GB are read, and then the device is out of memory."""
    monkeypatch.setattr(Placement, "memory", lambda self: 200_000)
    with pytest.raises(InputError, match=r"the model's weights take 8\.9 MiB"):
        Bagel.load(tiny_dir, "float32")
    ran = Cli(tiny_dir, tmp_path, capsys)("text2text", "--quiet", "--prompts", "a")
    assert_refused(ran, "the model's weights take")


@pytest.mark.usefixtures("unread")
def test_a_machine_without_memory(tiny_dir, monkeypatch):
    """The process of a model that is larger than the machine's memory is killed without a word."""
    monkeypatch.setattr(module, "machine_memory", lambda: 10**5)
    with pytest.raises(InputError, match=r"in float32 and the machine has .* give --dtype bfloat16, or give a machine"):
        Bagel.load(tiny_dir, "float32")


def test_pages_are_those_of_the_engine(tiny_dir, monkeypatch):
    """The line says one number of pages, and the engine has another."""
    monkeypatch.setattr(Placement, "memory", lambda self: 2**33)
    model = Bagel.open(tiny_dir, "float32", EngineConfig(topology="single-stage"))
    assert model.outlook.pages == model.engine.engine.context.store.pool.num_pages
    model.close()
