"""A context on its way from stage 0 to stage 1: within a process, to another device, to another process."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import process
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small import model, new_model, random_image

from bagel_jax.engine.handoff import ContextKV, Lease, Views
from bagel_jax.engine.kv.store import KVStore
from bagel_jax.errors import InputError
from bagel_jax.request import Request

ARRAYS = ("pages", "page_table", "length", "rope")
ABOUT = ("request_id", "image_shape", "drop_text", "drop_image")


def edit(request_id: str = "edit", **settings) -> Request:
    """An edit, of which all three branches differ."""
    return Request.create("img2img", "a red bench", random_image(), steps=5, request_id=request_id, **settings)


def drawing(request_id: str = "drawing", side: int = 32) -> Request:
    """An image from a text."""
    return Request.create("text2img", "a bench", steps=3, height=side, width=side, request_id=request_id)


@pytest.fixture(scope="module")
def context() -> ContextKV:
    """The context of `edit`."""
    return model().context(edit())


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The latents of `edit`."""
    return model().run(edit()).latents


def near(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded(context, tmp_path, dtype):
    """A context in bfloat16 cannot be written or read, or something of it is lost on the way."""
    saved = dataclasses.replace(context, pages=context.pages.astype(dtype))
    saved.save(tmp_path / "context")
    loaded = ContextKV.load(tmp_path / "context")
    for name in ARRAYS:
        ours, theirs = (np.asarray(getattr(x, name)) for x in (loaded, saved))
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.pages.dtype == jnp.dtype(dtype)
    assert [getattr(loaded, name) for name in ABOUT] == [getattr(saved, name) for name in ABOUT]
    assert loaded.num_pages == saved.num_pages
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_denoised_from_a_file(context, expected, tmp_path, dtype):
    """What was loaded cannot be denoised, since its arrays are not on a device, or in a dtype of their own."""
    dataclasses.replace(context, pages=context.pages.astype(dtype)).save(tmp_path / "context")
    latents = model().denoise(edit(), ContextKV.load(str(tmp_path / "context"))).latents
    if dtype == "float32":
        near(latents, expected)
    else:
        assert 0 < np.linalg.norm(latents - expected) < 0.05 * np.linalg.norm(expected)


def file_of(folder: Path, context: ContextKV, **changes: str) -> Path:
    """A saved context with other metadata."""
    context.save(folder / "good")
    with safe_open(folder / "good", framework="numpy") as file:
        metadata = file.metadata()
    save_file(load_file(folder / "good"), folder / "changed", metadata | changes)
    return folder / "changed"


def refused(path: Path, *parts: str) -> None:
    """The file is refused in one sentence that names it."""
    with pytest.raises(InputError) as caught:
        ContextKV.load(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    """A traceback of the file system for a misspelt name."""
    refused(tmp_path / "nothing", "cannot be read", "ContextKV.save writes one")


@pytest.mark.parametrize("content", [b"", b"not a context", b"\xff" * 64], ids=["empty", "text", "bytes"])
def test_no_safetensors_file(tmp_path, content):
    """A traceback of safetensors for a file of another kind."""
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file", "cannot be read")


def test_half_a_file(tmp_path, context):
    """A copy that was interrupted is taken for whole, or ends in a traceback."""
    context.save(tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    refused(tmp_path / "half", "cannot be read")


def test_a_file_of_something_else(tmp_path, context):
    """Weights, or another program's arrays, are taken for a context."""
    save_file({"x": np.zeros(3)}, tmp_path / "plain")
    refused(tmp_path / "plain", "is not a saved context")
    refused(file_of(tmp_path, context, format="something else"), "is not a saved context")


def test_a_file_of_another_version(tmp_path, context):
    """A file of an earlier layout is read as if it were of this one."""
    refused(file_of(tmp_path, context, version="1"), "version 1", "reads version 2")


def test_regressions_2_16_a_view_is_missing(context):
    """Two of three guidance contexts arrive: the third branch reads another's pages, or waits for ever."""
    for name in ("page_table", "length", "rope"):
        with pytest.raises(ValueError, match="the context of edit has tables of"):
            dataclasses.replace(context, **{name: getattr(context, name)[:2]})
    cut = {name: getattr(context, name)[:2] for name in ("page_table", "length", "rope")}
    with pytest.raises(ValueError, match="branches 1 and 2"):
        dataclasses.replace(context, **cut)
    assert len(dataclasses.replace(context, **cut, drop_image=1).length) == 2


def test_regression_2_16_a_saved_view_is_missing(context, tmp_path):
    """The same for a file."""
    context.save(tmp_path / "good")
    with safe_open(tmp_path / "good", framework="numpy") as file:
        metadata = file.metadata()
    about = json.loads(metadata["context"]) | {"drop_image": 3}
    save_file(load_file(tmp_path / "good"), tmp_path / "bad", metadata | {"context": json.dumps(about)})
    with pytest.raises(InputError, match="branches 1 and 3"):
        ContextKV.load(tmp_path / "bad")


@pytest.mark.parametrize("fault", ["no version", "no json", "no field", "negative view", "page beyond", "no array"])
def test_a_damaged_file(context, tmp_path, fault):
    """A file that was cut, or written by hand, is a traceback, or reads another request's pages."""
    context.save(tmp_path / "good")
    with safe_open(tmp_path / "good", framework="numpy") as file:
        metadata = file.metadata()
    arrays, about = load_file(tmp_path / "good"), json.loads(metadata["context"])
    if fault == "no version":
        del metadata["version"]
    elif fault == "no field":
        del about["image_shape"]
    elif fault == "negative view":
        about["drop_text"] = -1
    elif fault == "page beyond":
        arrays["page_table"] = arrays["page_table"] + 1000
    elif fault == "no array":
        del arrays["rope"]
    metadata["context"] = "{" if fault == "no json" else json.dumps(about)
    save_file(arrays, tmp_path / "bad", metadata)
    said = "is of version None" if fault == "no version" else "is damaged"
    with pytest.raises(InputError, match=f"bad {said}.*compute it again"):
        ContextKV.load(tmp_path / "bad")


def test_another_requests_context(context):
    """An image is made from the prompt of another request."""
    with pytest.raises(InputError, match="context is of request 'edit'; it must be that of 'other'"):
        model().denoise(edit("other"), context)


def test_another_size():
    """The noise and the context are of images of other sizes."""
    made = model().context(drawing(side=32))
    with pytest.raises(InputError, match=r"for an image of \(32, 32\); the request makes one of \(28, 28\)"):
        model().denoise(drawing(side=28), made)


@pytest.mark.parametrize("axis", [0, 2, 5])
def test_another_models_context(context, axis):
    """Pages of a model with other layers, heads or widths are written into this one's."""
    pages = np.concatenate([np.asarray(context.pages)] * 2, axis=axis)
    with pytest.raises(
        InputError, match=r"the context of 'edit' has pages of \[.*\]; this model and page_size 64 need"
    ):
        model().denoise(edit(), dataclasses.replace(context, pages=pages))


def test_a_context_of_another_page_size(context):
    """A context of pages of 64 tokens is read as one of pages of 16."""
    other = new_model(page_size=16)
    with pytest.raises(InputError, match="page_size 16 need"):
        other.denoise(edit(), context)
    other.close()


def test_after_a_refusal_the_next_is_served(context, expected):
    """A refused context keeps its place in stage 1, and after two of them nobody is served any more."""
    for _ in range(2 * model().settings.dit_max_num_seqs):
        with pytest.raises(InputError):
            model().denoise(edit("other"), context)
    near(model().denoise(edit(), context).latents, expected)
    engine = model().engine.engine
    assert not engine.offers
    assert not engine.denoise.jobs
    engine.denoise.store.check()


@pytest.mark.parametrize("modality", ["img2text", "text2text"])
def test_a_text_has_no_context(context, modality):
    """A request for a text waits in stage 1, which will never answer it."""
    image = random_image() if modality == "img2text" else None
    request = Request.create(modality, "why", image, max_tokens=2, request_id="edit")
    for call in (lambda: model().context(request), lambda: model().denoise(request, context)):
        with pytest.raises(InputError, match=f"{modality} has no context to hand over; text2img and img2img have"):
            call()


def test_a_given_context_skips_stage_0(context, expected, monkeypatch):
    """The context is computed once more although it is there."""
    stage, steps = model().engine.engine.context, []
    dispatch, submit = stage._dispatch, stage.submit
    monkeypatch.setattr(stage, "_dispatch", lambda plan: (steps.append("dispatch"), dispatch(plan))[1])
    monkeypatch.setattr(stage, "submit", lambda ticket: (steps.append("submit"), submit(ticket))[1])
    result = model().denoise(edit(), context)
    assert not steps
    assert result.prefilled_tokens == result.cached_prefix_tokens == 0
    near(result.latents, expected)


def test_a_context_skips_stage_1(monkeypatch):
    """Only the context is asked for, and an image is made, or a place for one is waited for."""
    monkeypatch.setattr(model().engine.engine.denoise, "accept", lambda *_: 1 / 0)
    made = model().context(drawing())
    assert (made.request_id, made.image_shape) == ("drawing", (32, 32))


def test_one_context_serves_many_images(context, expected):
    """A context is used up, or written to, by the first image that is made from it."""
    before = np.array(context.pages)
    near(model().denoise(edit(), context).latents, expected)
    other = model().denoise(edit(seed=1), context).latents
    assert np.abs(other - expected).max() > 1e-2
    near(model().denoise(edit(), context).latents, expected)
    np.testing.assert_array_equal(context.pages, before)


def test_move_to_the_same_device_copies_nothing(context):
    """Where both stages share a device every context is copied once more."""
    moved = context.move(model().engine.engine.denoise.store.placement.pages())
    assert moved.pages.unsafe_buffer_pointer() == context.pages.unsafe_buffer_pointer()
    assert context.move(context.pages.device).pages.unsafe_buffer_pointer() == context.pages.unsafe_buffer_pointer()
    assert moved.request_id == context.request_id


def test_regression_8_one_layout(context):
    """A context is of another layout than the caches of the stages, and is transposed twice on its way."""
    engine = model().engine.engine
    pages = context.pages
    for pool in (engine.context.store.pages, engine.denoise.store.pages):
        assert (pages.shape[0], *pages.shape[2:]) == (pool.shape[0], *pool.shape[2:])
        assert pages.dtype == pool.dtype


def test_views_share_pages(context):
    """What two branches have in common crosses twice."""
    plan = model().prepare(edit()).plan
    size = model().settings.page_size
    np.testing.assert_array_equal(context.length, [plan.cond.length, plan.drop_text.length, plan.drop_image.length])
    np.testing.assert_array_equal(context.rope, [plan.cond.rope, plan.drop_text.rope, plan.drop_image.rope])
    assert context.num_pages <= sum(-(-length // size) for length in (plan.cond.length, plan.drop_image.length))
    store = KVStore(model().placements[0], model().config, size, 10, model().dtype)
    store.pages = store.pages + np.arange(10, dtype=np.float32)[:, None, None, None, None]
    views = Views("edit", (32, 32), 1, 2, np.asarray([3, 2, 1]) * size, np.zeros(3, np.int32))
    exported = Lease(store, views, [[7, 3, 9], [7, 3], [5]]).export()
    np.testing.assert_array_equal(exported.page_table, [[0, 1, 2], [0, 1, 0], [3, 0, 0]])
    np.testing.assert_array_equal(exported.pages[0, :, 0, 0, 0, 0], [7, 3, 9, 5])


_OTHER_PROCESS = """
import sys
import jax
import numpy as np
from small import new_model
from test_handoff import edit

assert len(jax.devices()) == 2
made = new_model(ar_device=0, dit_device=1)
context = made.context(edit())
assert [d.id for d in context.pages.devices()] == [0], context.pages.devices()
stages = made.engine.engine.context, made.engine.engine.denoise
assert [d.id for d in context.move(stages[1].store.placement.pages()).pages.devices()] == [1]
assert [[d.id for d in stage.store.pages.devices()] for stage in stages] == [[0], [1]]
context.save(sys.argv[1] + "/context")
np.save(sys.argv[1] + "/latents", made.run(edit()).latents)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A folder with what a process whose stages are on two devices left there."""
    folder = tmp_path_factory.mktemp("elsewhere")
    paths = map(str, Path(__file__).parents[:3])  # this file, what it imports, and the package
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": os.pathsep.join(paths)}
    done = process("-c", _OTHER_PROCESS, folder, **flags)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_devices(elsewhere, expected):
    """A context cannot leave stage 0's device, or a stage works on the other's."""
    near(np.load(elsewhere / "latents.npy"), expected)


def test_two_processes(elsewhere, expected):
    """A context that another process computed gives another image here."""
    near(model().denoise(edit(), ContextKV.load(elsewhere / "context")).latents, expected)
