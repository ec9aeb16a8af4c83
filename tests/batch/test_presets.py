"""Benchmarks: their prompt files become requests, and results lie where their scorers look for them."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from batch.stub import run_many
from commands import process
from PIL import Image
from pyarrow import parquet

from bagel_jax.batch import __main__ as command
from bagel_jax.batch.job import Job, identity
from bagel_jax.batch.output import JobFolder
from bagel_jax.batch.presets import PRESETS, open_preset
from bagel_jax.batch.worker import Worker
from bagel_jax.errors import InputError
from bagel_jax.inputs.noise import TorchNormal, draw
from bagel_jax.request import Request, Result

PIXELS = np.random.RandomState(0).randint(0, 256, (12, 16, 3)).astype(np.uint8)


def evaluate(name: str, path: Path, output: Path, *flags: str, run=run_many) -> str:
    """A benchmark with the stub model, as the command line has it; returns what is told of the folder."""
    argv = [str(path), "--output", str(output), "--preset", name, *flags]
    args = command.parsed(argv)
    preset = open_preset(args)
    usual = command._usual(args)
    folder = JobFolder(output, identity(Job(preset), Path(__file__).parent, usual))
    preset.prepare()
    Worker(Job(preset), folder, 7, usual).run(run)
    return preset.lay_out(folder)


def files(folder: Path) -> list[str]:
    """All files of a folder."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def seen(requests: list[Request], run=run_many):
    """A model that keeps the requests."""

    def keep(some):
        for request in some:
            requests.append(request)
            yield request

    return lambda some: run(keep(some))


def geneval(path: Path, count: int) -> list[dict]:
    """GenEval's file."""
    entries = [
        {"tag": "single_object", "include": [{"class": str(i)}], "prompt": f"a photo of {i}"} for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, entries)) + "\n")
    return entries


def test_geneval(tmp_path):
    """The scorer finds no images, those of another prompt, or another prompt's metadata."""
    entries, requests = geneval(tmp_path / "prompts.jsonl", 20), []
    out = tmp_path / "out"
    told = evaluate("geneval", tmp_path / "prompts.jsonl", out, run=seen(requests))
    assert told == f"{out / 'geneval'} is for the scorer"
    wanted = [
        f"{i:05}/{file}" for i in range(20) for file in ("metadata.jsonl", *(f"samples/{k:05}.png" for k in range(4)))
    ]
    assert files(out / "geneval") == wanted
    for i, entry in enumerate(entries):
        assert json.loads((out / "geneval" / f"{i:05}" / "metadata.jsonl").read_text()) == entry
        for k in range(4):  # the stub draws by seed
            pixels = np.random.RandomState(42 + 4 * i + k).randint(0, 256, (8, 8, 3))
            assert np.array_equal(Image.open(out / "geneval" / f"{i:05}" / "samples" / f"{k:05}.png"), pixels)
    s = requests[0].settings
    assert (s.height, s.width, s.steps, s.timestep_shift, s.cfg_interval) == (1024, 1024, 50, 3.0, (0.0, 1.0))
    assert (s.cfg_text_scale, s.cfg_img_scale, s.cfg_renorm_type, s.cfg_renorm_min) == (4.0, 1.0, "global", 0.0)
    assert evaluate("geneval", tmp_path / "prompts.jsonl", out) == told  # once more, from what is there
    assert files(out / "geneval") == wanted


def test_flags_come_first(tmp_path):
    """A preset cannot be tried with few steps and small images."""
    geneval(tmp_path / "prompts.jsonl", 2)
    requests = []
    flags = "--height", "64", "--steps", "4", "--num-images", "1", "--seed", "7"
    evaluate("geneval", tmp_path / "prompts.jsonl", tmp_path / "out", *flags, run=seen(requests))
    assert [request.seed for request in requests] == [7, 8]
    assert requests[0].settings.height == 64
    assert requests[0].settings.width == 1024
    assert requests[0].settings.steps == 4
    assert files(tmp_path / "out" / "geneval")[1] == "00000/samples/00000.png"


def test_wise(tmp_path):
    """The scorer finds no images, or the plan of think mode is not sampled as officially, or lost."""
    entries = [{"Prompt": f"prompt {i}", "prompt_id": i + 100, "Hint": "a"} for i in range(3)]
    (tmp_path / "final_data.json").write_text(json.dumps(entries))

    def planned(requests):
        for request in requests:
            yield request, Result("a", "text2img", text="a plan", image=Image.fromarray(PIXELS))

    requests = []
    evaluate("wise", tmp_path / "final_data.json", tmp_path / "out", "--think", run=seen(requests, planned))
    assert files(tmp_path / "out" / "wise") == [f"{i + 100}.{end}" for i in range(3) for end in ("png", "txt")]
    assert (tmp_path / "out" / "wise" / "100.txt").read_text() == "a plan"
    s = requests[0].settings
    assert (s.do_sample, s.text_temperature, s.max_think_tokens, s.cfg_interval) == (True, 0.3, 2048, (0.4, 1.0))
    evaluate("wise", tmp_path / "final_data.json", tmp_path / "plain", run=seen(requests))
    assert files(tmp_path / "plain" / "wise") == ["100.png", "101.png", "102.png"]
    assert not requests[-1].settings.do_sample


def test_black_borders(tmp_path):
    """They are cut off officially, before the scorer sees the image; an image that is all black stays."""
    (tmp_path / "final_data.json").write_text(json.dumps([{"Prompt": "a", "prompt_id": i} for i in range(2)]))
    framed = np.pad(PIXELS | 1, ((3, 1), (0, 2), (0, 0)))

    def run(requests):
        for i, request in enumerate(requests):
            yield request, Result("a", "text2img", image=Image.fromarray(framed if i == 0 else framed * 0))

    evaluate("wise", tmp_path / "final_data.json", tmp_path / "out", run=run)
    assert np.array_equal(Image.open(tmp_path / "out" / "wise" / "0.png"), PIXELS | 1)
    assert Image.open(tmp_path / "out" / "wise" / "1.png").size == (18, 16)


def test_imgedit(tmp_path):
    """The images of ImgEdit, which lie beside its file, are not found; a missing one is not told of."""
    (tmp_path / "daily object").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "daily object" / "a.jpg")
    entries = {
        "1": {"id": "daily object/a.jpg", "prompt": "make it blue", "edit_type": "adjust"},
        "22": {"id": "gone.jpg", "prompt": "b"},
    }
    (tmp_path / "singleturn.json").write_text(json.dumps(entries))
    requests = []
    told = evaluate("imgedit", tmp_path / "singleturn.json", tmp_path / "out", run=seen(requests))
    assert told.endswith("is for the scorer; 1 of its images are missing")
    assert files(tmp_path / "out" / "imgedit") == ["1.png"]
    s = requests[0].settings
    assert (s.cfg_text_scale, s.cfg_img_scale, s.cfg_renorm_type, s.cfg_interval) == (4.0, 1.5, "text_channel", (0, 1))
    assert [request.seed for request in requests] == [42]


def gedit(folder: Path, **columns) -> Path:
    """A folder of GEdit-Bench, of two files."""
    image = BytesIO()
    Image.fromarray(PIXELS).save(image, "PNG")
    for number in range(2):
        rows = {
            "key": [f"k{number}{i}" for i in range(2)],
            "task_type": ["color_alter", "style_change"],
            "instruction": ["make it blue"] * 2,
            "instruction_language": ["en", "cn"],
            "input_image": [{"bytes": image.getvalue(), "path": None}] * 2,
            **columns,
        }
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({name: value for name, value in rows.items() if value is not None})
        parquet.write_table(table, folder / "data" / f"train-{number:05}-of-00002.parquet")
    return folder


def test_gedit(tmp_path):
    """The images in the Parquet files are not used, or the scorer finds no source beside an edit."""
    requests, out = [], tmp_path / "out"
    evaluate("gedit", gedit(tmp_path / "GEdit-Bench"), out, run=seen(requests))
    pairs = [f"{task}/k{n}{i}" for i, task in enumerate(("color_alter/en", "style_change/cn")) for n in range(2)]
    wanted = [f"gen_image/fullset/{pair}{end}.png" for pair in pairs for end in ("", "_SRCIMG")]
    assert files(out / "gedit") == sorted(wanted)
    assert np.array_equal(Image.open(out / "gedit" / "gen_image/fullset/style_change/cn/k11_SRCIMG.png"), PIXELS)
    assert {(request.seed, request.image_seeds) for request in requests} == {(42, (43,))}
    assert np.array_equal(requests[0].inputs[0].open(), PIXELS)
    # As after the official script's set_seeds(42), whose autoencoder draws on the GPU.
    _, latent = draw("official", 42, (16, 64), requests[0].image_seeds, [(4, 4, 16)])
    assert np.array_equal(latent, TorchNormal(42)(16, 64))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("geneval", None, "cannot be read (No such file or directory); geneval reads a line a prompt, as {"),
        ("geneval", b'{"prompt": "a"}\n{"prompt": ', "is no JSON in line 1 ("),
        ("geneval", b'{"prompt": "a"}\n{"tag": 5}', "has no usable 'prompt' in entry 1"),
        ("geneval", b"\xff\xfe", "is not valid Unicode text"),
        ("wise", b'{"Prompt": "a"}', "holds a JSON dict; wise reads a list as ["),
        ("wise", b'[{"Prompt": "a"}]', "has no usable 'prompt_id' in entry 0"),
        ("wise", b'[{"Prompt": "a", "prompt_id": "../a"}]', "has '../a' for part of a file's name"),
        ("imgedit", b"[1]", "holds a JSON list; imgedit reads an object as {"),
        ("imgedit", b'{"1": {"id": "a.png"}}', "has no usable 'prompt' in entry 1"),
        ("imgedit", b'{"a/b": {"id": "a.png", "prompt": "a"}}', "has 'a/b' for part of a file's name"),
        ("gedit", b"no Parquet", "cannot be read as Parquet ("),
    ],
)
def test_a_file_that_is_no_such_benchmark(tmp_path, name, content, message):
    """A traceback, or a job of nothing, or files outside of the folder."""
    path = tmp_path / "prompts"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        evaluate(name, path, tmp_path / "out")
    assert str(error.value).startswith(f"{path} {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"instruction": None}, "has no column instruction in train-00000-of-00002.parquet"),
        ({"key": ["../../a", "b"]}, "has '../../a' for part of a file's name"),
    ],
)
def test_parquet_files_that_are_not_gedits(tmp_path, columns, message):
    """A traceback, or files outside of the folder."""
    with pytest.raises(InputError) as error:
        evaluate("gedit", gedit(tmp_path / "data", **columns), tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-images", "2"), "num_images is 2; wise has one image a prompt"),
        (("--format", "webdataset"), "format is webdataset; --preset wise needs files, which it lays out"),
        (("--prompts", "a"), "prompts are given; wise has its own, so leave --prompts out"),
    ],
)
def test_flags_without_meaning(tmp_path, flags, message):
    """Images overwrite each other, or are not there when they are to be laid out."""
    with pytest.raises(InputError) as error:
        evaluate("wise", tmp_path, tmp_path / "out", *flags)
    assert str(error.value) == message


def test_presets_are_documented():
    """A preset that nobody finds."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    assert all(f"--preset {name}" in text for name in PRESETS)


@pytest.mark.slow
def test_command(tmp_path):
    """The command line as a person has it."""
    geneval(tmp_path / "prompts.jsonl", 2)
    args = ["--preset", "geneval", "--height", 32, "--width", 32, "--steps", 2, "--num-images", 2]
    done = process("-m", "bagel_jax.batch", tmp_path / "prompts.jsonl", "--output", tmp_path / "out", *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"\n{tmp_path / 'out' / 'geneval'} is for the scorer\n")
    assert len(files(tmp_path / "out" / "geneval")) == 6
    missing = process("-m", "bagel_jax.batch", tmp_path, "--output", tmp_path / "new", "--preset", "wise")
    assert missing.returncode == 2
    assert missing.stderr.startswith(f"error: {tmp_path} cannot be read (Is a directory); wise reads ")
