"""The command line without --model: the bundled demo model, and its examples for what is not given."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path

import numpy as np
import pytest
from commands import Ran, process
from PIL import Image

from bagel_jax import MODALITIES
from bagel_jax.bagel import Bagel
from bagel_jax.demo.example import EXAMPLES, MODEL
from bagel_jax.run import main
from tools.demo.world import COLORS, Scene, draw

NOTE = (
    "note: no --model given, so the bundled demo model (coloured shapes, 64x64) is used; for BAGEL-7B-MoT: "
    "hf download ByteDance-Seed/BAGEL-7B-MoT --local-dir models/BAGEL-7B-MoT, then --model models/BAGEL-7B-MoT"
)
RED_CIRCLE = "a red circle on a white background"
# What an example says, or the colour in the middle of the image that it makes.
ANSWERS = {"text2text": "The capital of France is Paris.", "img2text": RED_CIRCLE, "text2img": "red", "img2img": "blue"}


@pytest.fixture(scope="session")
def demo() -> Bagel:
    """What `Bagel.load` gives without a directory."""
    return Bagel.load(dtype="float32")


class Cli:
    """`cli(*options)` calls `main` with these and no others, in a working directory of its own."""

    def __init__(self, folder: Path, capsys):
        self._folder, self._capsys = folder, capsys

    def __call__(self, *options) -> Ran:
        self._capsys.readouterr()
        code = main([str(x) for x in options])
        return Ran(code, *self._capsys.readouterr(), self._folder / "output")


@pytest.fixture
def opened(demo, monkeypatch) -> list[Path]:
    """The models that the command line opens; in fact it gets the one that is loaded already."""
    paths = []
    monkeypatch.setattr(Bagel, "open", lambda path, *_: (paths.append(Path(path)), copy.copy(demo))[1])
    return paths


@pytest.fixture
def cli(tmp_path, capsys, monkeypatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(tmp_path, capsys)


def command(ran: Ran) -> list[str]:
    """The arguments of the command that a run printed, as a shell would read them."""
    [line] = [line for line in ran.err.splitlines() if " -m bagel_jax.run " in line]
    python, *start, _ = shlex.split(line)[:4]
    assert Path(python).exists()
    assert start == ["-m", "bagel_jax.run"]
    return shlex.split(line)[3:]


def color_amid(image: np.ndarray) -> str:
    """The name of the colour that is nearest to an image's middle."""
    middle = image[32, 32].astype(int)
    return min(COLORS, key=lambda name: np.abs(middle - COLORS[name]).sum())


@pytest.mark.parametrize("modality", MODALITIES)
def test_modality_alone_runs_an_example(cli, opened, modality):
    """Somebody's first try would end in an error, or in something that cannot be had again or built upon."""
    ran = cli("--modality", modality)
    assert ran.code == 0
    assert opened == [MODEL]
    assert ran.err.splitlines()[0] == NOTE
    [record] = ran.records
    assert (record["prompt"], record["seed"]) == (EXAMPLES[modality].prompt, 0)
    arguments = command(ran)
    assert "--model" in arguments
    assert ("--image-path" in arguments) is modality.startswith("img")
    if modality.endswith("text"):
        assert ran.out == ANSWERS[modality] + "\n"
        assert record["text"] == ANSWERS[modality]
    else:
        assert color_amid(ran.image()) == ANSWERS[modality]
        assert ran.image().shape == (64, 64, 3)
        assert (ran.image()[[0, 0, -1, -1], [0, -1, 0, -1]] > 200).all()  # white corners

    files = {path.name: path.read_bytes() for path in ran.folder.glob("*.png")}
    again = cli(*arguments)
    assert (again.code, again.out) == (0, ran.out)
    assert "note:" not in again.err
    assert {path.name: path.read_bytes() for path in again.folder.glob("*.png")} == files
    assert opened == [MODEL, MODEL]


def test_printed_command_is_pasted(tmp_path):
    """The printed command would be one that a shell takes apart differently, or one with paths of another place."""
    first = process("-m", "bagel_jax.run", "--modality", "text2text", "--output", tmp_path / "an output")
    assert first.returncode == 0, first.stderr
    [line] = [line for line in first.stderr.splitlines() if " -m bagel_jax.run " in line]
    again = process("-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1], shell=True))", line)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert again.stdout == ANSWERS["text2text"] + "\n"


def test_answer_has_a_line_of_its_own(cli, opened):
    """The answer would stand behind a progress bar that is still there."""
    ran = cli("--modality", "text2text")
    bar = ran.err[ran.err.index("decoding:") :]
    assert bar.endswith("\n")


@pytest.mark.usefixtures("opened")
def test_example_with_other_options(cli, tmp_path):
    """Options beside the example would be lost, in the run or in the command it prints."""
    options = "--steps", "3", "--seed", "7", "--think", "--output", str(tmp_path / "output"), "--save-latents"
    ran = cli("--modality", "text2img", *options)
    assert ran.code == 0
    [record] = ran.records
    assert (record["prompt"], record["seed"], record["settings"]["steps"]) == (RED_CIRCLE, 7, 3)
    assert record["text"]
    assert ran.latents().shape == (16, 64)
    arguments = command(ran)
    assert all(option in arguments for option in options)
    image = ran.image()
    assert np.array_equal(cli(*arguments).image(), image)


@pytest.mark.usefixtures("opened")
def test_own_prompts_about_the_example_image(cli):
    """A question without an image would be refused, or answered without a word about which image it was."""
    ran = cli("--modality", "img2text", "--prompts", "What shape is it?", "What color is the shape?")
    assert (ran.code, ran.out) == (0, "circle\nred\n")
    assert "no image given, so the bundled example stands in" in ran.err
    assert cli(*command(ran)).out == ran.out


@pytest.mark.usefixtures("opened")
def test_own_images_with_the_example_prompt(cli, tmp_path):
    """Two images and no prompt would be an error about one prompt that nobody gave."""
    for name in ("green", "yellow"):
        Image.fromarray(draw(Scene("square", COLORS[name], COLORS["black"], 18, 32, 32))).save(f"{name}.png")
    ran = cli("--modality", "img2text", "--image-path", "green.png", "yellow.png")
    assert ran.code == 0
    assert [record["prompt"] for record in ran.records] == [EXAMPLES["img2text"].prompt] * 2
    assert "green" in ran.records[0]["text"]
    assert "yellow" in ran.records[1]["text"]
    assert cli(*command(ran)).out == ran.out


@pytest.mark.usefixtures("opened")
def test_prompts_of_a_file(cli, tmp_path):
    """The example's prompt would be asked in place of those in the file, or the command would name both."""
    Path("prompts.txt").write_text("What shape is it?\n")
    ran = cli("--modality", "img2text", "--txt-prompts", "prompts.txt")
    assert (ran.code, ran.out) == (0, "circle\n")
    assert "--prompts" not in command(ran)
    assert "no prompt" not in ran.err


@pytest.mark.usefixtures("opened")
def test_nothing_missing_but_the_model(cli):
    """Whoever forgets --model would take the demo model's answers for those of the large one."""
    ran = cli("--modality", "text2text", "--prompts", EXAMPLES["text2text"].prompt)
    assert (ran.code, ran.out) == (0, ANSWERS["text2text"] + "\n")
    assert ran.err.count("note:") == 1
    assert ran.err.startswith(NOTE + "\n")
    assert " -m bagel_jax.run " not in ran.err


@pytest.mark.usefixtures("opened")
def test_quiet(cli):
    """A log file would fill with advice although --quiet was given."""
    ran = cli("--modality", "text2text", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, ANSWERS["text2text"] + "\n", "")


def test_refusals(cli, tmp_path):
    """A size that only the large model can do would be refused by a model that is not named."""
    ran = cli("--modality", "text2img", "--height", 1024)
    assert ran.code == 2
    assert ran.err.startswith(NOTE + "\n")
    error = "error: height is 1024; it must be a multiple of 16 and at most 64 for this model"
    assert ran.err.splitlines()[-1] == error
    # What is wrong whatever the model is one sentence, as ever.
    ran = cli("--modality", "img2img", "--steps", 1)
    assert ran.code == 2
    assert ran.err.startswith("error: steps is 1;")
    assert ran.err.count("\n") == 1
    ran = cli("--modality", "text2text", "--image-path", EXAMPLES["img2text"].image)
    assert ran.code == 2
    assert ran.err.startswith("error: text2text was given an image;")
    assert not ran.folder.exists()


def test_a_given_model_has_no_examples(cli, tiny_dir):
    """A forgotten prompt or image would cost minutes of a large model's time."""
    ran = cli("--model", tiny_dir, "--modality", "img2img")
    assert (ran.code, ran.err) == (2, "error: neither of --prompts and --txt-prompts was given; give one of them\n")
    ran = cli("--model", tiny_dir, "--modality", "img2img", "--prompts", "make it blue")
    assert (ran.code, ran.err) == (2, "error: img2img was given no image; it needs one\n")


def test_help_tells_of_the_default(capsys):
    """Nobody would know what runs without --model."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "[--model DIR] [--modality" in text
    assert "default: the bundled demo model" in text


def test_python_without_a_directory(demo):
    """The three lines of Python would need a download first, or use another model than the command line."""
    assert demo._source.directory == MODEL
    assert demo.generate("text2text", "What is the capital of France?").text == ANSWERS["text2text"]
    result = demo.generate("img2text", *EXAMPLES["img2text"])
    assert result.text == RED_CIRCLE


def test_example_images():
    """The examples would weigh on every clone, or show what the world never shows."""
    images = list((MODEL.parent / "examples").iterdir())
    assert {e.image for e in EXAMPLES.values() if e.image} == set(images)
    assert all(path.stat().st_size < 2000 for path in images)
    with Image.open(EXAMPLES["img2img"].image) as image:
        assert np.array_equal(image, draw(Scene("circle", COLORS["red"], COLORS["white"], 18, 32, 32)))
