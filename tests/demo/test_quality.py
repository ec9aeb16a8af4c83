"""benchmarks/demo_quality.py: the numbers that the demo model is accepted by."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec
import pytest
from PIL import Image

from bagel_jax.errors import InputError
from bagel_jax.request import DEFAULTS
from tools.demo.data import pairs
from tools.demo.world import COLORS, COMBINATIONS, EDIT_KINDS, QUESTIONS, Scene, draw, facts, held_out

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TASKS = ("text2img", "img2img", "img2text", "text2text", "think")
SPLITS = ("trained", "held out")


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("demo_quality", BENCHMARKS / "demo_quality.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # as for a script
        patch.setitem(sys.modules, "demo_quality", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module
    sys.modules.pop("oracle", None)


def right_scene(case) -> Scene:
    """What a perfect model draws."""
    return case.edit.apply(case.before) if case.edit else Scene.of(case.shows, Random(case.seed))


def model_of(quality, change=lambda scene: scene, say=lambda text: text):
    """A perfect model but for a change of its images and one of its words."""

    def answer(case):
        image = Image.fromarray(draw(change(right_scene(case)))) if case.shows else None
        return quality.Answer(image, None if case.says is None else say(case.says))

    return answer


def other(color: tuple[int, int, int], *taken: tuple[int, int, int]) -> tuple[int, int, int]:
    """The next colour of the palette."""
    colors = list(COLORS.values())
    after = colors[colors.index(color) + 1 :] + colors
    return next(c for c in after if c not in (color, *taken))


def wrong_ground(scene: Scene) -> Scene:
    return replace(scene, ground=other(scene.ground, scene.color))


def shifted(by: float):
    """A change that moves the shape, towards the middle so that it stays in the image."""
    return lambda scene: replace(scene, x=scene.x + (by if scene.x < 32 else -by))


# --- Cases ---


@pytest.mark.parametrize("split", SPLITS)
def test_splits(quality, split):
    """A model praised for what it was trained on, or blamed as if it had been."""
    held = split == "held out"
    for task in ("text2img", "think"):
        assert all(held_out(*case.shows) == held for case in quality.cases(task, split, 60))
    assert all(held_out(*case.before.combination) == held for case in quality.cases("img2text", split, 60))
    sources = []
    for case in quality.cases("img2img", split, 80):
        source, result = case.before.combination, case.edit.result(case.before.combination)
        assert result == case.shows
        assert None not in source
        assert (held_out(*source) or held_out(*result)) == held
        assert case.groups[1:] == ((f"{'source' if held_out(*source) else 'result'} held out",) if held else ())
        sources.append(held_out(*source))
    assert sum(sources) == (40 if held else 0)


def test_cases_are_the_same_every_time(quality):
    """Two models scored on different cases cannot be compared."""
    for task in TASKS:
        for split in SPLITS:
            made = quality.cases(task, split, 30)
            assert made == quality.cases(task, split, 30)
            assert made[:7] == quality.cases(task, split, 7)
            assert len({case.name for case in made}) == len(made)
    assert quality.cases("text2img", "trained", 30) != quality.cases("text2img", "trained", 30, seed=1)


def test_cases_are_spread_evenly(quality):
    """A score for red circles only."""
    shown = [case.shows for case in quality.cases("text2img", "held out", 200)]
    pool = [c for c in COMBINATIONS if held_out(*c)]
    assert {shown.count(c) for c in pool} <= {200 // len(pool), -(-200 // len(pool))}
    for split in SPLITS:
        kinds = [(case.edit.kind, case.groups[1:]) for case in quality.cases("img2img", split, 80)]
        assert {kind for kind, _ in kinds} == set(EDIT_KINDS)
        assert {kinds.count(each) for each in kinds} == {10 if split == "held out" else 20}


def test_images_are_fresh(quality):
    """An image of the training set, which the model may know by heart."""
    trained = {scene for before, _, after in pairs(500) for scene in (before, after)}
    made = [case.before for task in ("img2img", "img2text") for case in quality.cases(task, "trained", 200)]
    assert len(set(made)) == 400
    assert not trained & set(made)


def test_questions_in_default_form(quality):
    """Every fact is asked once; every question about an image equally often."""
    asked = quality.cases("text2text", "trained", 200)
    assert [(case.prompt, case.says) for case in asked] == [(fact.forms[0], fact.answer) for fact in facts()]
    assert quality.cases("text2text", "held out", 200) == []
    prompts = [case.prompt for case in quality.cases("img2text", "trained", 40)]
    forms = [QUESTIONS[kind].forms[0] for kind in ("caption", "color", "shape", "ground")]
    assert prompts == forms * 10
    for case in quality.cases("img2text", "held out", 20):
        assert case.says == QUESTIONS[case.groups[0]].answer(case.before.combination)


@pytest.mark.parametrize(
    ("task", "split", "count"), [("draw", "trained", 1), ("think", "all", 1), ("think", SPLITS[0], 0)]
)
def test_no_such_cases(quality, task, split, count):
    with pytest.raises(InputError):
        quality.cases(task, split, count)


# --- Scores ---


@pytest.mark.parametrize("task", TASKS)
def test_perfect_model(quality, task):
    """A right answer counted as wrong."""
    for split in SPLITS if task != "text2text" else SPLITS[:1]:
        asked = quality.cases(task, split, 24)
        found = quality.score(asked, model_of(quality, say=lambda text: f" {text}\n"))
        assert (found["cases"], found["right"], found["percent"]) == (24, 24, 100)
        assert set(found["parts"].values()) == {24}
        assert all(group["cases"] == group["right"] for group in found["groups"].values())
        assert found["failures"] == []


def test_wrong_ground(quality):
    """A wrong image counted as right, or the wrong part blamed."""
    found = quality.score(quality.cases("text2img", "trained", 20), model_of(quality, wrong_ground))
    assert found["percent"] == 0
    assert found["parts"] == {"color": 20, "shape": 20, "ground": 0}
    assert len(found["failures"]) == 20
    assert found["failures"][0]["wrong"] == ["ground"]

    asked = quality.cases("img2img", "held out", 16)
    found = quality.score(asked, model_of(quality, wrong_ground))
    assert found["percent"] == 0
    assert found["parts"] == {"change": 12, "rest": 4, "place": 16}  # four of them were to change the ground

    found = quality.score(quality.cases("think", "trained", 8), model_of(quality, wrong_ground))
    assert found["right"] == 0
    assert found["parts"] == {"plan": 8, "image": 0}


@pytest.mark.parametrize(("by", "right"), [(3, True), (6, False)])
def test_an_edit_keeps_the_place(quality, by, right):
    """A shape drawn anew elsewhere is no edit."""
    for case in quality.cases("img2img", "trained", 16):
        verdict = quality.judge(case, model_of(quality, shifted(by))(case))
        assert verdict.parts == {"change": True, "rest": True, "place": right}
        assert verdict.read["moved"] == pytest.approx(by, abs=1)


def test_an_edit_changes_something(quality):
    """The input image handed back."""
    asked = quality.cases("img2img", "trained", 16)
    found = quality.score(asked, lambda case: quality.Answer(Image.fromarray(draw(case.before))))
    assert found["parts"] == {"change": 0, "rest": 16, "place": 16}
    assert found["right"] == 0


def test_words_are_exact(quality):
    """An answer that only resembles the right one."""
    for task in ("img2text", "text2text"):
        asked = quality.cases(task, "trained", 12)
        for say in (str.upper, lambda text: text + ".", lambda text: ""):
            assert quality.score(asked, model_of(quality, say=say))["right"] == 0
    found = quality.score(quality.cases("think", "trained", 8), model_of(quality, say=str.upper))
    assert found["right"] == 0
    assert found["parts"] == {"plan": 0, "image": 8}


def test_one_question_is_reported_alone(quality):
    """A model that cannot tell shapes hidden behind one that knows colours."""
    asked = quality.cases("img2text", "trained", 16)
    found = quality.score(asked, lambda case: quality.Answer(text="?" if case.groups == ("shape",) else case.says))
    assert found["percent"] == 75
    assert {kind: group["right"] for kind, group in found["groups"].items()} == {
        "caption": 4,
        "color": 4,
        "shape": 0,
        "ground": 4,
    }


@pytest.mark.parametrize("size", [None, 32, 512])
def test_no_image_to_read(quality, size, tmp_path):
    """An image of another size ends the run, or passes."""
    given = quality.Answer(None if size is None else Image.new("RGB", (size, size)))
    for task in ("text2img", "img2img", "think"):
        asked = quality.cases(task, "trained", 4)
        found = quality.score(asked, lambda case: given, tmp_path)
        assert found["right"] == 0
        assert set(found["parts"].values()) == {0}
        json.dumps(found, allow_nan=False)


def test_blank_images_in_json(quality):
    """Where no shape is seen its place is not a number, which json has no word for."""
    asked = quality.cases("img2img", "trained", 4)
    found = quality.score(asked, lambda case: quality.Answer(Image.new("RGB", (64, 64))))
    assert found["parts"]["place"] == 0
    json.dumps(found, allow_nan=False)


def test_report(quality):
    """A table that hides what was wanted."""
    scores = [
        quality.score(
            quality.cases(task, split, 8), model_of(quality, wrong_ground if split == "held out" else replace)
        )
        for task, split in [("text2img", "trained"), ("text2img", "held out"), ("text2text", "trained")]
    ]
    text = quality.report(scores)
    assert "| text2img | 100.0 % | 0.0 % | 95 / 85 % |" in text
    assert "| text2text | 100.0 % | – | 100 % |" in text
    assert "text2img, held out: 0 of 8 right in 0 s; color 100.0 %, shape 100.0 %, ground 0.0 %" in text


# --- The model ---


def test_requests_have_the_default_settings(quality):
    """A score for settings that nobody uses."""
    for task in TASKS:
        case = quality.cases(task, "trained", 1)[0]
        made = quality.request(case, {})
        default = DEFAULTS[made.modality]
        drawn = made.modality == "text2img"
        assert made.settings == (msgspec.structs.replace(default, height=64, width=64) if drawn else default)
        assert made.think == (task == "think")
        assert made.prompt == case.prompt
        assert quality.request(case, {"steps": 3}).settings.steps == (3 if made.makes_image else default.steps)
        assert made.notes == quality.request(case, {"steps": 3}).notes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "0"], "cases is 0"),
        (["--steps", "1"], "steps is 1"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(quality, options, message, capsys):
    assert quality.main(options) == 2
    assert message in capsys.readouterr().err


def test_results_that_cannot_be_written(quality, tiny_dir, tmp_path, capsys):
    """Found out after half an hour of work."""
    assert quality.main(["--model", str(tiny_dir), "--json", str(tmp_path / "no" / "scores.json")]) == 2
    assert "scores.json cannot be written" in capsys.readouterr().err


def test_a_model_that_has_learnt_nothing(quality, tiny_dir, tmp_path, capsys):
    """All of it, from the checkpoint to the files."""
    file, folder = tmp_path / "scores.json", tmp_path / "images"
    options = ["--tasks", "text2img", "text2text", "--cases", "2", "--steps", "3", "--max-tokens", "8"]
    assert quality.main(["--model", str(tiny_dir), "--json", str(file), "--save", str(folder), *options]) == 0
    out = capsys.readouterr().out
    assert "| text2img | 0.0 % | 0.0 % | 95 / 85 % |" in out
    assert "Not the default settings: steps 3, max_tokens 8." in out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [(s["task"], s["cases"], s["right"]) for s in record["scores"]] == [
        ("text2img", 2, 0),
        ("text2img", 2, 0),
        ("text2text", 2, 0),
    ]
    assert record["settings"]["text2img"]["steps"] == 3
    assert len(list(folder.glob("text2img-*.png"))) == 4


@pytest.mark.slow
def test_every_task_of_a_model_that_has_learnt_nothing(quality, tiny_dir, tmp_path):
    """Its edits come out at 512 pixels, which counts as wrong."""
    file = tmp_path / "scores.json"
    options = ["--cases", "2", "--think-cases", "1", "--steps", "3", "--max-tokens", "8", "--max-think-tokens", "8"]
    assert quality.main(["--model", str(tiny_dir), "--json", str(file), *options]) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    assert len(record["scores"]) == 9
    assert all(s["percent"] == 0 for s in record["scores"])
