"""The demo world's training set and its tokenizer, as written."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagel_jax.errors import InputError
from bagel_jax.inputs.prepare import THINK_PROMPTS
from bagel_jax.inputs.tokenizer import Tokenizer
from tools.demo import data, tokenizer, world
from tools.demo.world import COMBINATIONS, QUESTIONS, SHAPES

PAIRS = 300
HELD_OUT = [c for c in COMBINATIONS if world.held_out(*c)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("set")
    data.write(directory, PAIRS)
    return directory


@pytest.fixture(scope="module")
def records(directory) -> dict[str, list[list[dict]]]:
    """Segments of each record, by file."""
    return {
        path.stem: [json.loads(line)["segments"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in directory.glob("*.jsonl")
    }


def digest(directory: Path) -> str:
    """Of all files and their names."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    content = b"".join(str(path.relative_to(directory)).encode() + path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()


def scenes_by_file(count: int = PAIRS) -> dict[str, world.Scene]:
    """What each image shows."""
    made = [scene for before, _, after in data.pairs(count) for scene in (before, after)]
    return {f"images/{n // 1000:02d}/{n:05d}.png": scene for n, scene in enumerate(made)}


def test_form(directory, records):
    """A trainer would fail in the middle of a run."""
    assert set(records) == {*data.SHARES, "train"}
    segments = [segment for file in records.values() for record in file for segment in record]
    for segment in segments:
        assert ("text" in segment) != ("image" in segment)
        assert set(segment) <= {"text", "image", "as", "target", "drop"}
        assert segment.get("target", True) is True
        if "image" in segment:
            assert ("as" in segment) != ("target" in segment)
            assert segment.get("as", "vit") in ("vit", "vae", "both")
    assert all(record[-1].get("target") for file in records.values() for record in file)
    used = {segment["image"] for segment in segments if "image" in segment}
    written = {path.relative_to(directory).as_posix() for path in directory.rglob("*.png")}
    assert used == written
    assert len(written) == 2 * PAIRS
    for name in sorted(used)[:20]:
        with Image.open(directory / name) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")


def test_tasks(records):
    """Each task in the form in which a request comes: what is read, and what is to be made."""
    forms = {
        name: {tuple(s.get("as", "target" if "target" in s else "text") for s in record) for record in records[name]}
        for name in data.SHARES
    }
    assert forms == {
        "see": {("vit", "text", "target"), ("vit", *["text", "target"] * 3)},
        "caption": {("vit", "text", "target")},
        "img2img": {("both", "text", "target")},
        "text2img": {("text", "target")},
        "think": {("text", "text", "target", "target")},
        "text2text": {("text", "target")},
    }
    think = records["think"][0]
    assert think[0]["text"] == THINK_PROMPTS["image"]
    assert think[2]["text"].startswith("<think>a ")
    assert len(records["img2img"]) == PAIRS
    assert len(records["see"]) == 2 * PAIRS
    assert len(records["caption"]) == len(records["text2img"]) == len(records["think"]) > 0.6 * PAIRS


def test_answers_fit_the_images(directory, records):
    """A set with wrong answers teaches nothing."""
    scenes = scenes_by_file()
    for name, scene in scenes.items():
        with Image.open(directory / name) as image:
            assert np.array_equal(np.asarray(image), world.draw(scene))
    questions = {form: question for question in QUESTIONS.values() for form in question.forms}
    for image, *turns in records["see"] + records["caption"]:
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert questions[question["text"]].answer(scenes[image["image"]].combination) == answer["text"]
    for prompt, image in records["text2img"]:
        assert prompt["text"] in world.prompts(scenes[image["image"]].combination)
    for _, prompt, plan, image in records["think"]:
        c = scenes[image["image"]].combination
        assert (prompt["text"], plan["text"]) == (world.caption(c), world.plan(c))


def test_edits_keep_place_and_size(records):
    """A model would learn to move what it is to recolour."""
    scenes = scenes_by_file()
    kinds = Counter()
    for (before, edit, after), record in zip(data.pairs(PAIRS), records["img2img"], strict=True):
        assert scenes[record[0]["image"]] == before
        assert scenes[record[2]["image"]] == after == edit.apply(before)
        assert record[1]["text"] in edit.forms
        assert (before.radius, before.x, before.y) == (after.radius, after.x, after.y)
        kinds[edit.kind] += 1
    assert min(kinds[kind] for kind in world.EDIT_KINDS) > PAIRS / 6


def test_nothing_held_out_is_shown_or_told(records):
    """What is reported of unseen combinations would be of seen ones."""
    seen = Counter(scene.combination for scene in scenes_by_file(3000).values())
    assert not set(HELD_OUT) & set(seen)
    assert set(COMBINATIONS) - set(HELD_OUT) <= set(seen)
    texts = {segment["text"] for file in records.values() for record in file for segment in record if "text" in segment}
    told = {form for c in HELD_OUT for form in (*world.prompts(c), world.plan(c))}
    assert not texts & told
    triple = re.compile(rf"(\w+) ({'|'.join(SHAPES)}) on an? (\w+)")
    found = {match.groups() for text in texts for match in triple.finditer(text)}
    assert len(found) > 100
    assert not found & set(HELD_OUT)


def test_many_colors_have_no_name(records):
    """Without them a model learns which combinations exist, and not to look."""
    scenes = scenes_by_file().values()
    nameless = [scene for scene in scenes if None in scene.combination]
    assert 0.4 < len(nameless) / len(scenes) < 0.7
    for scene in scenes:
        assert world.distance(scene.color, scene.ground) >= world.CLEARLY_APART


def test_default_forms_prevail(records):
    """The forms by which a model is judged are those it has mostly seen."""
    edits = [
        (record[1]["text"], edit) for record, (_, edit, _) in zip(records["img2img"], data.pairs(PAIRS), strict=True)
    ]
    assert sum(text == edit.instruction for text, edit in edits) > 0.75 * PAIRS
    defaults = {fact.forms[0] for fact in world.facts()}
    asked = Counter(record[0]["text"] for record in records["text2text"])
    assert defaults <= set(asked)
    assert min(asked[question] for question in defaults) >= data._FACT_REPEATS / 2


def test_mixture(records):
    """Each task has its share of `train.jsonl`."""
    sizes = {task: {json.dumps(record) for record in records[task]} for task in data.SHARES}
    counts = Counter(next(t for t in data.SHARES if json.dumps(r) in sizes[t]) for r in records["train"])
    total = PAIRS / data.SHARES["img2img"]
    assert counts == {task: round(total * share) for task, share in data.SHARES.items()}
    assert sum(data.SHARES.values()) == pytest.approx(1)


def test_same_seed_same_set(directory, tmp_path):
    """A run could not be repeated."""
    data.write(tmp_path / "again", PAIRS)
    assert digest(tmp_path / "again") == digest(directory)
    data.write(tmp_path / "other", 20, seed=1)
    assert list(data.pairs(20, 0)) == list(data.pairs(300, 0))[:20] != list(data.pairs(20, 1))


def test_new_color(tmp_path, capsys):
    """The set to learn pink from: ten different images, all shapes, all grounds, beside the other files."""
    assert data.main([str(tmp_path), "--new-color", "pink"]) == 0
    assert "pink.jsonl: 10 records" in capsys.readouterr().out
    lines = (tmp_path / "pink.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line)["segments"] for line in lines]
    scenes = data.new_color_scenes("pink")
    assert len(records) == len(scenes) == len({scene.combination for scene in scenes}) == 10
    for (prompt, image), scene in zip(records, scenes, strict=True):
        assert re.fullmatch(r"a pink \w+ on an? \w+ background", prompt["text"])
        assert prompt["text"] == world.caption(scene.combination)
        assert image["target"]
        with Image.open(tmp_path / image["image"]) as image:
            assert np.array_equal(np.asarray(image), world.draw(scene))
    assert {scene.shape for scene in scenes} == set(SHAPES)
    assert {scene.combination.ground for scene in scenes} == set(world.COLORS)
    known = [json.loads(line)["segments"][0]["text"] for line in (tmp_path / "known.jsonl").open(encoding="utf-8")]
    trained = {world.caption(c) for c in world.COMBINATIONS if not world.held_out(*c)}
    assert len(known) == data.KNOWN_IMAGES
    assert set(known) <= trained


def test_pink_is_in_no_training_image():
    """It would not be new."""
    pink = world.NEW_COLORS["pink"]
    for scene in scenes_by_file(1000).values():
        assert min(world.distance(pink, color) for color in (scene.color, scene.ground)) > 80  # white is at 82


@pytest.mark.parametrize("options", [["--pairs", "0"], ["--seed", "-1"], ["--new-color", "mauve"]])
def test_bad_options(tmp_path, capsys, options):
    """Exit code 2 and one line, and nothing written."""
    assert data.main([str(tmp_path / "set"), *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "set").exists()


def test_directory_that_is_a_file(tmp_path, capsys):
    """Exit code 2 and its name."""
    (tmp_path / "file").write_text("")
    assert data.main([str(tmp_path / "file"), "--pairs", "1"]) == 2
    assert "file" in capsys.readouterr().err
    with pytest.raises(InputError):
        tokenizer.build(tmp_path / "file")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    assert tokenizer.build(directory) == tokenizer.VOCABULARY
    return directory


def test_tokenizer_files(built, tiny_dir, tmp_path):
    """In the form of the small checkpoint's, small enough for a repository, and the same each time."""
    files = sorted(path.name for path in built.iterdir())
    assert files == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert sum(path.stat().st_size for path in built.iterdir()) < 60_000
    ours, tiny = (json.loads((d / "tokenizer.json").read_text(encoding="utf-8")) for d in (built, tiny_dir))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert ours[part] == tiny[part]
    ours, tiny = (json.loads((d / "tokenizer_config.json").read_text()) for d in (built, tiny_dir))
    assert set(ours) == set(tiny)
    tokenizer.build(tmp_path)
    assert digest(tmp_path) == digest(built)


@pytest.mark.parametrize("only", ["tokenizer.json", "vocab.json merges.txt"])
def test_either_form_gives_the_same_tokens(built, tmp_path, only):
    """The official code reads vocab.json and merges.txt, faster readers tokenizer.json."""
    for name in (*only.split(), "tokenizer_config.json"):
        (tmp_path / name).write_bytes((built / name).read_bytes())
    whole, part = Tokenizer(built), Tokenizer(tmp_path)
    assert (whole.im_start, whole.im_end, whole.vision_start, whole.vision_end) == (696, 697, 698, 699)
    for text in sorted(set(tokenizer.sentences())):
        assert whole.prompt(text) == part.prompt(text)


def test_tokens_of_the_world(built):
    """A word in pieces is harder to learn; only names of cities may be."""
    made = Tokenizer(built)
    cities = {word for capital in world.CAPITALS.values() for word in capital.split()}
    for text in sorted(set(tokenizer.sentences())):
        ids = made.prompt(text)
        assert made.answer(list(ids)) == text
        words = re.findall(r"\w+|[^\w\s]+", text)
        if not cities & set(words) and "<" not in text:
            assert len(ids) - 2 == len(words), text
    red = made.prompt("a red star")[2]
    assert red in made.prompt("make it red")
    assert red in made.prompt("a blue circle on a red background")
    assert len(made.prompt("red")) == 3


@pytest.mark.parametrize(
    "text", ["", "  two  spaces\n\n", "naïve 漢字 🎉\t1234", "don't <think> </think>", "\x00\u202e"]
)
def test_any_text_survives(built, text):
    """A person may write anything."""
    made = Tokenizer(built)
    assert made.answer(list(made.prompt(text))) == text
