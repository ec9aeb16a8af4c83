"""Writes a training set of the demo world.

    python -m tools.demo.data DIR                    the world: 30000 edits, 60000 images
    python -m tools.demo.data DIR --new-color pink   ten images of a colour that the world has not, and 250 of it

A file of records for each task, and `train.jsonl`, a mixture of all. A record is one line of JSON,
`{"segments": [...]}`, and a segment one of

    {"text": "..."}                                       read
    {"text": "...", "target": true}                       to be answered
    {"text": "...", "drop": false}                        read, and never left out
    {"image": "images/00/00000.png", "as": "vit"}       seen by the ViT ("vit"), the autoencoder ("vae") or "both"
    {"image": "images/00/00001.png", "target": true}    to be made

with paths relative to the file. Nothing in the set shows or names a held-out combination. A model that knows which
combinations exist answers from memory instead of looking, so many images have colours without a name, and many
questions are about one or two attributes only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from tqdm import tqdm

from bagel_jax.errors import InputError, check_choice, check_whole
from bagel_jax.inputs.prepare import THINK_PROMPTS
from tools.demo.world import (
    COLORS,
    COMBINATIONS,
    EDIT_KINDS,
    NEW_COLORS,
    QUESTIONS,
    SHAPES,
    Combination,
    Edit,
    Scene,
    caption,
    draw,
    edits,
    facts,
    held_out,
    nameless_color,
    place,
    plan,
    prompts,
)

PAIRS = 30000
# The tasks, each with its part of `train.jsonl`.
SHARES = {"see": 0.25, "caption": 0.1, "img2img": 0.25, "text2img": 0.25, "think": 0.08, "text2text": 0.07}
NEW_COLOR_IMAGES = 10
KNOWN_IMAGES = 250

_NAMELESS = 0.35  # of shapes, and of grounds, that have a colour without a name
_QUESTIONS = 3  # of one image, at most, in one record
_DEFAULT_FORM = 0.85  # of sentences that are in their default form
_FOLDER = 1000  # images in one folder
_FACT_REPEATS = 20  # there are few facts; so often each stands in text2text.jsonl, for its forms to be there


def pairs(count: int, seed: int = 0) -> Iterator[tuple[Scene, Edit, Scene]]:
    """Images before and after an edit, neither of them held out; the i-th depends on `seed` and i alone."""
    for i in range(count):
        rng = Random(f"pair {seed} {i}")
        while True:
            before = _scene(rng)
            edit = rng.choice(edits(before.combination, rng.choice(EDIT_KINDS)))
            after = edit.apply(before)
            if not (held_out(*before.combination) or held_out(*after.combination)):
                yield before, edit, after
                break


def _scene(rng: Random) -> Scene:
    """A random image; shape and ground each have a colour of the palette or one without a name."""
    c = rng.choice(COMBINATIONS)
    color, ground = COLORS[c.color], COLORS[c.ground]
    if rng.random() < _NAMELESS:
        color = nameless_color(rng)
    if rng.random() < _NAMELESS:
        ground = nameless_color(rng, color)
    return Scene(c.shape, color, ground, *place(rng))


def new_color_scenes(name: str, seed: int = 0) -> list[Scene]:
    """Ten images of shapes in a colour of NEW_COLORS: all shapes, all grounds of the palette, no two alike.

    Raises:
        InputError: there is no such new colour.
    """
    check_choice("new color", name, tuple(NEW_COLORS))
    rng = Random(f"{name} {seed}")
    grounds = rng.sample(list(COLORS), len(COLORS))
    # After a round of the grounds they meet the next shapes.
    chosen = [(SHAPES[i % 4], grounds[(i + i // 8) % 8]) for i in range(NEW_COLOR_IMAGES)]
    return [Scene.of(Combination(name, shape, ground), rng) for shape, ground in chosen]


def write(directory: Path, count: int = PAIRS, seed: int = 0, *, progress: bool = False) -> dict[str, int]:
    """Writes a training set of `count` edits and `2 count` images; returns the number of records by file.

    Raises:
        InputError: `count` or `seed` is out of range, or the directory cannot be made.
    """
    check_whole("pairs", count, 1)
    check_whole("seed", seed, 0)
    rng = Random(f"records {seed}")
    tasks: dict[str, list[str]] = {task: [] for task in SHARES}

    def add(task: str, *segments: dict[str, Any]) -> None:
        tasks[task].append(_line(segments))

    for i, (before, edit, after) in enumerate(tqdm(pairs(count, seed), total=count, disable=not progress, unit="pair")):
        numbered = ((2 * i, before), (2 * i + 1, after))
        files = [_write_image(directory, f"{n // _FOLDER:02d}/{n:05d}", scene) for n, scene in numbered]
        add("img2img", _seen(files[0], "both"), _text(_form(edit.forms, rng)), _made(files[1]))
        for file, scene in zip(files, (before, after), strict=True):
            c = scene.combination
            asked = {kind: q for kind, q in QUESTIONS.items() if kind != "caption" and q.answer(c) is not None}
            # The shape is what takes long to see, so it is asked of every image, among others in any order.
            others = [kind for kind in asked if kind != "shape"]
            kinds = ["shape", *rng.sample(others, min(len(others), _QUESTIONS - 1))]
            rng.shuffle(kinds)
            turns = [(_text(_form(asked[k].forms, rng)), _answer(asked[k].answer(c))) for k in kinds]
            add("see", _seen(file, "vit"), *(segment for turn in turns for segment in turn))
            if None not in c:
                question = QUESTIONS["caption"]
                add("caption", _seen(file, "vit"), _text(_form(question.forms, rng)), _answer(question.answer(c)))
                add("text2img", _text(_form(prompts(c), rng)), _made(file))
                system = _text(THINK_PROMPTS["image"]) | {"drop": False}
                add("think", system, _text(caption(c)), _answer(plan(c)), _made(file))
    for _ in range(_FACT_REPEATS):
        for fact in facts():
            add("text2text", _text(_form(fact.forms, rng)), _answer(fact.answer))

    tasks["train"] = _mixture(tasks, rng)
    for task, lines in tasks.items():
        _write_lines(directory / f"{task}.jsonl", lines)
    return {task: len(lines) for task, lines in tasks.items()}


def write_new_color(directory: Path, name: str, seed: int = 0) -> dict[str, int]:
    """Writes `<name>.jsonl`, ten captions with their images, and `known.jsonl`; returns the records by file.

    `known.jsonl` has images of the world as it is, for a model that learns the colour not to forget the rest while
    it does (the prior preservation of DreamBooth, https://arxiv.org/abs/2208.12242).

    Raises:
        InputError: there is no such new colour, or the directory cannot be made.
    """
    rng = Random(f"known {seed}")
    trained = [c for c in COMBINATIONS if not held_out(*c)]
    known = [Scene.of(rng.choice(trained), rng) for _ in range(KNOWN_IMAGES)]
    counts = {}
    for task, scenes in ((name, new_color_scenes(name, seed)), ("known", known)):
        lines = []
        for i, scene in enumerate(scenes):
            file = _write_image(directory, f"{task}/{i}", scene)
            lines.append(_line((_text(caption(scene.combination)), _made(file))))
        _write_lines(directory / f"{task}.jsonl", lines)
        counts[task] = len(lines)
    return counts


def _mixture(tasks: dict[str, list[str]], rng: Random) -> list[str]:
    """Every edit once and the other tasks by their shares, cut or repeated as need be, in random order."""
    total = len(tasks["img2img"]) / SHARES["img2img"]
    mixed = []
    for task, share in SHARES.items():
        lines = rng.sample(tasks[task], len(tasks[task]))
        wanted = round(total * share)
        mixed += (lines * (wanted // len(lines) + 1))[:wanted] if lines else []
    rng.shuffle(mixed)
    return mixed


def _form(forms: Sequence[str], rng: Random) -> str:
    """Mostly the first."""
    return forms[0] if len(forms) == 1 or rng.random() < _DEFAULT_FORM else rng.choice(forms[1:])


def _text(text: str) -> dict[str, Any]:
    return {"text": text}


def _answer(text: str) -> dict[str, Any]:
    return {"text": text, "target": True}


def _seen(file: str, as_: str) -> dict[str, Any]:
    return {"image": file, "as": as_}


def _made(file: str) -> dict[str, Any]:
    return {"image": file, "target": True}


def _line(segments: Sequence[dict[str, Any]]) -> str:
    return json.dumps({"segments": list(segments)}) + "\n"


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(lines), encoding="utf-8")


def _write_image(directory: Path, name: str, scene: Scene) -> str:
    """Writes an image; returns its path relative to the directory."""
    file = f"images/{name}.png"
    path = directory / file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made ({error.strerror}); give a directory to write to") from None
    Image.fromarray(draw(scene)).save(path, compress_level=1)
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for bad input."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("directory", metavar="DIR", type=Path, help="where to write")
    p.add_argument("--pairs", metavar="N", type=int, default=PAIRS, help=f"edits, of two images each ({PAIRS})")
    p.add_argument("--seed", metavar="S", type=int, default=0, help="another seed gives another set (0)")
    p.add_argument("--new-color", metavar="NAME", help=f"write only ten images of {' or '.join(NEW_COLORS)}")
    args = p.parse_args(argv)
    try:
        if args.new_color is not None:
            counts = write_new_color(args.directory, args.new_color, args.seed)
        else:
            counts = write(args.directory, args.pairs, args.seed, progress=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{args.directory / name}.jsonl: {count:,} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
