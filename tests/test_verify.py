"""The check of a model: what is right passes, what is broken does not."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import copy, edit_tensors, official_shapes, read_tensors, write_holes, write_official
from PIL import Image

from bagel_jax.demo.example import MODEL
from bagel_jax.request import Result
from bagel_jax.verify import DEMO, PUBLISHED, check_answers, check_files, main, table


def answers(known, source, steps, by=0):
    """A model that draws a known picture at some steps, `by` off, and black ones otherwise."""

    def run(request):
        if request.modality == "text2text":
            return Result("a", "text2text", text=known.answer)
        image = Image.new("RGB", (request.settings.width or 64, request.settings.height or 64))
        if request.settings.steps == steps:
            for place, (red, green, blue) in known.pixels[source].items():
                image.putpixel(place, (red, green, blue - by))
        return Result("a", "text2img", image=image)

    return run


def test_files_of_the_published_model(tmp_path):
    """What is known of the published files is wrong, and everybody's download fails the check."""
    rows, known = check_files(write_official(tmp_path / "published"))
    assert known is PUBLISHED
    # ae.safetensors is published in float32, ema.safetensors in bfloat16.
    assert [row.ok for row in rows] == [True] * 7
    assert rows[0].got == "1,223"


def test_a_tensor_that_is_missing(tmp_path, capsys):
    """A file without one of its tensors passes, or ends in a traceback."""
    model = write_official(tmp_path / "published")
    shapes = official_shapes("ema")
    del shapes["language_model.model.layers.5.mlp.up_proj.weight"]
    write_holes(model / "ema.safetensors", shapes)
    assert main(["--model", str(model)]) == 1
    out = capsys.readouterr().out
    assert "tensor language_model.model.layers.5.mlp.up_proj.weight is missing" in out
    assert out.endswith("4 of 7 checks differ\n")


@pytest.mark.parametrize("steps", PUBLISHED.steps)
@pytest.mark.parametrize("source", PUBLISHED.pixels)
def test_which_picture_fits(source, steps):
    """A picture that fits one reference is called wrong because of the others, or nobody learns which one it fits."""
    rows = check_answers(answers(PUBLISHED, source, steps, by=4), PUBLISHED)
    assert not [row for row in rows if row.ok is False]
    fitting = [row.check for row in rows[1:5] if row.ok]
    assert fitting == [f"A cute cat, {steps - 1} evaluations, {source}"]
    assert [row.ok for row in rows[5:]] == [True] * 10


def test_a_picture_that_fits_nothing():
    """Wrong weights pass."""
    rows = check_answers(answers(PUBLISHED, "vllm-omni", 15, by=6), PUBLISHED)
    assert [row.ok for row in rows[:5]] == [True] + [False] * 4
    assert "NO" in table(rows)


def test_an_answer_that_is_not_the_known_one():
    """Another answer passes."""

    def run(request):
        return Result("a", "text2text", text="Berlin.") if request.modality == "text2text" else draw(request)

    draw = answers(DEMO, "itself", 15)
    assert [row.ok for row in check_answers(run, DEMO)] == [False] + [True] * 11


def test_a_model_of_its_own():
    """A fine-tune, whose answers nobody knows, is called wrong."""
    rows = check_answers(answers(DEMO, "itself", 15), None)
    assert [row.ok for row in rows] == [None, None]
    assert rows[1].got.startswith("64x64, on average ")


@pytest.mark.parametrize("known", [DEMO, None])
def test_latents_that_are_not_finite(known):
    """A NaN among the weights ends in a traceback, or passes where nothing is expected."""

    def run(request):
        raise FloatingPointError("the latents are not finite")

    rows = check_answers(run, known)
    assert [(row.got, row.ok) for row in rows] == [("the latents are not finite", False)] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "is not a directory"), ("empty", "holds neither ema.safetensors nor")],
)
def test_no_model(tmp_path, capsys, name, message):
    """A wrong path looks like a model that differs."""
    (tmp_path / "empty").mkdir()
    assert main(["--model", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.slow
def test_the_bundled_model(capsys):
    """The check says of a model that is right that it is wrong."""
    assert main([]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.endswith("all is as expected\n")


def swapped(tensors):
    """Two tensors of one shape, each under the other's name."""
    first, second = (f"language_model.model.layers.{i}.mlp_moe_gen.down_proj.weight" for i in (0, 3))
    return {first: tensors[second], second: tensors[first]}


def not_a_number(tensors):
    """One value of one tensor."""
    name = "language_model.model.layers.2.mlp_moe_gen.down_proj.weight"
    return {name: np.where(np.arange(tensors[name].size).reshape(tensors[name].shape) == 77, np.nan, tensors[name])}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [swapped, not_a_number])
def test_a_damaged_model(tmp_path, capsys, damage):
    """Weights that no header tells anything of are broken, and the check passes."""
    model = copy(MODEL, tmp_path / "model")
    tensors = read_tensors(model / "ema.safetensors")
    kind = next(iter(tensors.values())).dtype
    edit_tensors(model / "ema.safetensors", **{name: x.astype(kind) for name, x in damage(tensors).items()})
    assert main(["--model", str(model)]) == 1
    out = capsys.readouterr().out
    assert "names and shapes of tensors" in out
    assert out.count("NO") >= 1
