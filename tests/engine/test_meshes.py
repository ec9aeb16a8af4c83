"""A stage over many devices gives what one device gives; a CPU pretends to have eight."""

from __future__ import annotations

import itertools
import json
import os

import pytest
from commands import process
from golden import GENERATION, UNDERSTANDING

EIGHT = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"}
ALL = [*GENERATION, *UNDERSTANDING, "text2img_taylorseer"]
LITTLE = ["text2img_think", "img2text"]
SPLIT = {"ar_mesh": "tensor=4", "dit_mesh": "data=2,sequence=2", "ar_devices": "0-3", "dit_devices": "4-7"}


def told(**job) -> list[dict]:
    """What `meshes.py` tells of a job."""
    done = process("tests/meshes.py", json.dumps(job), **EIGHT, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    # What XLA says where it gathers an array whole in order to cut it otherwise; of the same kind it aborts over some.
    assert "Involuntary full rematerialization" not in done.stderr, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(one: dict) -> None:
    """A mesh's results are the official ones, and the second request found its programs."""
    assert all(one["texts"].values()), one
    assert all(error < 1e-4 for error in one["errors"].values()), one
    assert one.get("pixels", 0) <= 1
    assert one["compiled"] == []


def test_golden_numbers_on_meshes():
    """Rows that meet on one device, tokens that are not shared out evenly, a context that is moved: another image."""
    meshes = [{"mesh": "data=2,sequence=3"}, SPLIT]
    found = told(golden=[[settings, LITTLE] for settings in meshes])
    assert [one["settings"] for one in found] == meshes
    for one in found:
        check(one)
    assert [one["devices"] for one in found] == [[[*range(6)]] * 2, [[0, 1, 2, 3], [4, 5, 6, 7]]]
    # Of four devices along tensor two share out the two KV heads; the MLP is cut four ways.
    assert [one["page_share"] for one in found] == [[1, 1], [2, 1]]
    assert 0.25 < found[1]["weight_share"][0] < 0.42
    assert found[1]["weight_share"][1] == 1


@pytest.mark.slow
def test_random_load_on_a_mesh():
    """Requests that come and go on several devices are told apart by other arrays than on one."""
    for one in told(loads=[{"mesh": "data=2,tensor=2"}], heads=[{"mesh": "tensor=3"}]):
        assert one["difference"] < 1e-5, one


def test_an_image_is_read_by_all_devices():
    """Each device does the whole of the ViT, also for the four others that do the same."""
    shapes = [[4, 1, 1], [1, 3, 1]]
    for one, shape in zip(told(vit=shapes), shapes, strict=True):
        assert one["error"] < 1e-5, one
        assert one["share"] < 1.25 / max(shape), one


@pytest.mark.slow
def test_random_loads_on_uneven_meshes():
    """Nothing may depend on two or four KV heads."""
    meshes = ["data=2,tensor=3", "data=3,sequence=2"]
    for one in told(heads=[{"mesh": mesh} for mesh in meshes]):
        assert one["difference"] < 1e-5, one


# Data, sequence, tensor: each alone and with each other, powers of two and what cuts nothing evenly.
SOME = [(3, 1, 1), (8, 1, 1), (1, 3, 1), (1, 7, 1), (1, 1, 3), (1, 1, 8), (4, 2, 1), (2, 1, 3), (1, 3, 2), (2, 2, 2)]
EVERY = [shape for shape in itertools.product(range(1, 9), repeat=3) if 1 < shape[0] * shape[1] * shape[2] <= 8]


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [SOME, pytest.param(EVERY, marks=pytest.mark.by_hand)], ids=["some", "every"])
def test_golden_numbers_on_many_meshes(shapes):
    """A mesh that nobody has tried cuts something in the middle."""
    meshes = [{"mesh": "data={},sequence={},tensor={}".format(*shape)} for shape in shapes]
    assert len(meshes) in (10, 37)
    found = told(golden=[[settings, LITTLE] for settings in meshes])
    assert len(found) == len(meshes)
    for one in found:
        check(one)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,sequence=2,tensor=2", "data=3,tensor=2", "tensor=8"])
def test_all_golden_cases_on_a_mesh(mesh):
    """Edits have three rows, and forecasts arrays of their own."""
    (one,) = told(golden=[[{"mesh": mesh}, ALL]])
    check(one)
    assert one["errors"].keys() == {*GENERATION, "text2img_taylorseer"}
    assert one["texts"].keys() == {"text2img_think", *UNDERSTANDING}
