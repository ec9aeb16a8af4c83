"""Conversations from a file: what is wrong with it, and what the command line makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Ran
from small import model, new_model, random_image

from bagel_jax.bagel import Bagel
from bagel_jax.engine.session import Session
from bagel_jax.errors import InputError
from bagel_jax.run import main
from bagel_jax.turns import read_turns

DRAW = {"draw": "a red bench", "height": 32, "width": 24}
EDIT = {"draw": "make it blue"}
ASK = {"ask": "what is it?", "max_tokens": 4}


@pytest.fixture
def file(tmp_path) -> Callable[..., Path]:
    """Writes a file of turns; texts are lines as they are."""

    def write(*turns: dict[str, Any] | str) -> Path:
        path = tmp_path / "turns.jsonl"
        lines = [turn if isinstance(turn, str) else json.dumps(turn) for turn in turns]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def cli(tmp_path, tiny_dir, capsys) -> Callable[..., Ran]:
    """Calls the command line with a file of turns."""

    def call(turns: Path, *options: Any) -> Ran:
        folder = tmp_path / "output"
        start = "--model", tiny_dir, "--turns", turns, "--output", folder, "--steps", 3
        capsys.readouterr()
        try:
            code = main([str(x) for x in (*start, *options)])
        except SystemExit as stop:  # argparse
            code = stop.code
        return Ran(code, *capsys.readouterr(), folder)

    return call


@pytest.fixture
def small(monkeypatch) -> Bagel:
    """The command line gets the small model."""
    made = new_model()
    monkeypatch.setattr(Bagel, "open", lambda *_: made)
    return made


BAD = {
    "no JSON": ('{"draw": "a bench"', "is no JSON"),
    "no object": ('["draw"]', "is no object"),
    "neither": ('{"image": "in.png"}', 'either "draw" or "ask"'),
    "both": ('{"draw": "a bench", "ask": "what?"}', 'either "draw" or "ask"'),
    "no text": ('{"draw": 5}', "draw is 5; it must be a text"),
    "null": ('{"ask": null}', 'either "draw" or "ask"'),
    "empty": ('{"ask": ""}', "ask is ''; it must be a text that is not empty"),
    "unknown setting": ('{"draw": "a bench", "colour": 1}', "there is no setting colour; there are draw, ask, image,"),
    "not for turns": ('{"draw": "a bench", "request_id": "x"}', "there is no setting request_id"),
    "steps": ('{"draw": "a bench", "steps": 1}', "steps is 1; it must be a whole number, from 2"),
    "a float": ('{"draw": "a bench", "steps": 3.5}', "steps is 3.5"),
    "not finite": ('{"draw": "a bench", "cfg_text_scale": NaN}', "cfg_text_scale is nan"),
    "seed": ('{"draw": "a bench", "seed": -1}', "seed is -1"),
    "think": ('{"ask": "why", "think": "yes"}', "think is 'yes'; it must be true or false"),
    "interval": ('{"draw": "a bench", "cfg_interval": [1, 0]}', "LO must not be above HI"),
    "choice": ('{"draw": "a bench", "cfg_renorm_type": []}', "cfg_renorm_type is []"),
    "negative prompt": ('{"draw": "a bench", "negative_prompt": 5}', "negative_prompt is 5"),
    "image": ('{"draw": "a bench", "image": "no/such.png"}', "image no/such.png does not exist"),
    "image's name": ('{"draw": "a bench", "image": 500}', "image is 500; it must be a text"),
    "half a letter": ('{"draw": "\\ud800"}', "not valid Unicode"),
}


@pytest.mark.parametrize(("line", "part"), BAD.values(), ids=BAD)
def test_a_bad_line(file, line, part):
    """A line that cannot be done is found when its turn has come, or the error does not say where."""
    path = file(DRAW, "", line, EDIT)
    with pytest.raises(InputError) as caught:
        read_turns(str(path), {})
    message = str(caught.value)
    assert message.startswith(f"--turns {path}, line 3: ")
    assert part in message
    assert "\n" not in message


def test_bad_files(tmp_path, file):
    """A file that is not there, holds nothing or is no text: a traceback, or a run without turns."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, part in (
        (tmp_path / "nothing", "cannot be read as text"),
        (tmp_path, "cannot be read as text"),
        (binary, "give a file in UTF-8"),
        (file("", "  "), "holds no turn"),
    ):
        with pytest.raises(InputError) as caught:
            read_turns(str(path), {})
        assert str(caught.value).startswith(f"--turns {path} ")
        assert part in str(caught.value)


def test_usual_options_are_checked_too(file):
    """An option of the command line that no turn can have is found when the model is loaded."""
    with pytest.raises(InputError, match="line 1: steps is 1"):
        read_turns(str(file(DRAW)), {"steps": 1})
    assert read_turns(str(file(DRAW | {"steps": 2})), {"steps": 1})[0].options["steps"] == 2


def test_read_turns(file, tmp_path):
    """A turn loses its image or its settings, or does the other thing."""
    random_image().save(tmp_path / "in.png")
    path = file("\ufeff" + json.dumps(DRAW), "", ASK, EDIT | {"image": str(tmp_path / "in.png"), "seed": 3})
    turns = read_turns(str(path), {"steps": 9, "think": False})
    assert [(turn.draws, turn.prompt, turn.image is not None) for turn in turns] == [
        (True, "a red bench", False),
        (False, "what is it?", False),
        (True, "make it blue", True),
    ]
    assert turns[0].options == {"steps": 9, "think": False, "height": 32, "width": 24}
    assert turns[2].options == {"steps": 9, "think": False, "seed": 3}
    np.testing.assert_array_equal(turns[2].image.open(), random_image())


def test_a_conversation(cli, file, small, tmp_path):
    """Turns are answered apart from each other, or the record names other settings than were used."""
    random_image(1).save(tmp_path / "in.png")
    brought = {"draw": "like this", "image": str(tmp_path / "in.png"), "steps": 4}
    ran = cli(file(DRAW, EDIT, ASK, brought), "--seed", 5, "--save-latents", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    modalities = ["text2img", "img2img", "img2text", "img2img"]
    records = ran.records
    assert [record["id"] for record in records] == [f"output_{i}" for i in range(4)]
    assert [record["modality"] for record in records] == modalities
    assert [record["prompt"] for record in records] == ["a red bench", "make it blue", "what is it?", "like this"]
    assert [record["seed"] for record in records] == [5, 6, 7, 8]
    assert [record["settings"].get("steps") for record in records] == [3, 3, None, 4]
    assert [record["image"] for record in records] == ["output_0.png", "output_1.png", None, "output_3.png"]
    assert ran.out == records[2]["text"] + "\n"
    assert records[1]["cached_prefix_tokens"] > 0

    session = Session(model().run, seed=5)
    results = [session.draw("a red bench", height=32, width=24, steps=3), session.draw("make it blue", steps=3)]
    results.append(session.ask("what is it?", max_tokens=4))
    session.add(random_image(1))
    results.append(session.draw("like this", steps=4))
    assert records[2]["text"] == results[2].text
    for i in (0, 1, 3):
        np.testing.assert_allclose(ran.latents(i), results[i].latents, rtol=1e-4, atol=1e-4)
        assert np.abs(ran.image(i).astype(int) - np.asarray(results[i].image)).max() <= 1


@pytest.mark.usefixtures("no_weights")
def test_a_bad_file_before_the_weights(cli, file):
    """A misspelt setting in the last line is found after minutes of loading and drawing."""
    path = file(DRAW, EDIT | {"stepps": 3})
    ran = cli(path)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"error: --turns {path}, line 2: there is no setting stepps")
    assert ran.err.count("\n") == 1
    assert not ran.folder.exists()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--modality", "text2img"), "both of --modality and --turns"),
        (("--prompts", "a bench"), "--prompts was given beside --turns"),
        (("--txt-prompts", "prompts.txt"), "--txt-prompts was given beside --turns"),
        (("--image-path", "in.png"), "--image-path was given beside --turns"),
        (("--init-noise", "noise.npz"), "--init-noise was given beside --turns"),
    ],
)
def test_not_beside_turns(cli, file, options, part):
    """What a conversation cannot use is dropped without a word."""
    ran = cli(file(DRAW), *options)
    assert (ran.code, ran.out) == (2, "")
    assert part in ran.err
    assert ran.err.count("\n") == 1
    assert not ran.folder.exists()


@pytest.mark.usefixtures("small")
def test_a_turn_that_cannot_be_done(cli, file):
    """A size that this model has not: what was drawn before is lost, or turns are answered that build on nothing."""
    ran = cli(file(DRAW, {"ask": "x " * 40000}, EDIT), "--quiet")
    assert ran.code == 2
    done, failed = ran.records
    assert (done["id"], done["image"], "error" in done) == ("output_0", "output_0.png", False)
    assert ran.image(0).shape == (32, 24, 3)
    assert failed["id"] == "output_1"
    assert failed["error"].startswith("InputError: ")
    assert ran.err.startswith("error: turn 1 failed: the request may need")
    assert ran.err.count("\n") == 1
    assert [path.name for path in ran.folder.glob("*.png")] == ["output_0.png"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("error", "code"), [(FloatingPointError("not finite"), 1), (KeyboardInterrupt(), 130)])
def test_a_turn_that_fails(cli, file, monkeypatch, error, code):
    """The same for a fault at run time, or when somebody interrupts: a traceback, or results are lost."""
    run, calls = Bagel.run, []

    def failing(self, request, progress=None):
        calls.append(request)
        if len(calls) == 2:
            raise error
        return run(self, request, progress)

    monkeypatch.setattr(Bagel, "run", failing)
    ran = cli(file(DRAW, EDIT, EDIT), "--quiet")
    assert ran.code == code
    assert len(calls) == 2
    assert ran.records[0]["image"] == "output_0.png"
    assert [record["id"] for record in ran.records] == ["output_0", "output_1"][: len(ran.records)]
    assert ("turn 1 failed: not finite" in ran.err) == (code == 1)
    assert "Traceback" not in ran.err


@pytest.mark.usefixtures("small")
def test_results_that_cannot_be_written(cli, file, tmp_path):
    """A full disk, or here a folder in an image's place, is a traceback."""
    (tmp_path / "output" / "output_1.png").mkdir(parents=True)
    ran = cli(file(DRAW, EDIT, EDIT), "--quiet")
    assert ran.code == 1
    assert ran.records[0]["image"] == "output_0.png"
    assert "turn 1 failed" in ran.err


def test_a_number_of_thousands_of_digits(file):
    """Python refuses to read such a number with an error that is not of JSON: a traceback."""
    with pytest.raises(InputError, match="line 1"):
        read_turns(str(file('{"draw": "a bench", "seed": ' + "1" * 5000 + "}")), {})


@pytest.mark.usefixtures("small")
def test_options_are_for_the_turns_that_they_concern(cli, file):
    """An image's option beside --turns is said to have no effect on every question."""
    ran = cli(file(DRAW, ASK), "--max-tokens", 3, "--cfg-text-scale", 2)
    assert ran.code == 0
    assert [record["notes"] for record in ran.records] == [[], []]
    assert ran.records[0]["settings"]["cfg_text_scale"] == 2
    assert "no effect" not in ran.err
    said = cli(file(DRAW, {**ASK, "height": 32})).records[1]["notes"]
    assert said == ["height has no effect on img2text"]  # but what a line itself asks for in vain is told
