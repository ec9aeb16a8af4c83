"""Whether a model is whole and computes what it should: `python -m bagel_jax.verify --model DIR`.

One table: the files, an answer, and pixels of a picture, beside what is known of the published model and of the bundled
one. Of any other model, or one that was trained further, answer and picture are shown beside nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from bagel_jax import __version__
from bagel_jax.bagel import Bagel
from bagel_jax.checkpoint.files import CheckpointFiles
from bagel_jax.checkpoint.load import PublishedCheckpoint
from bagel_jax.checkpoint.sizes import read_config
from bagel_jax.checkpoint.source import ModelSource
from bagel_jax.checkpoint.store import MANIFEST
from bagel_jax.checkpoint.table import AUTOENCODER, MAIN
from bagel_jax.command import BAD_INPUT, DONE, FAILED, INTERRUPTED, Parser, add_flags, from_flags
from bagel_jax.config import BagelConfig
from bagel_jax.demo.example import MODEL
from bagel_jax.errors import InputError
from bagel_jax.request import Request, Result
from bagel_jax.settings import EngineConfig

Run = Callable[[Request], Result]
Pixels = Mapping[tuple[int, int], tuple[int, int, int]]  # (x, y) -> red, green, blue

TOLERANCE = 5  # of 255, in each colour: what another kernel or another chip may change
_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Known:
    """A model whose answers are known.

    Args:
        name: what people call it.
        sizes: width, layers and vocabulary, by which it is recognised.
        files: of each file its tensors, its parameters and the bytes of its weights.
        question, answer: a text2text request and its greedy answer.
        drawing: a text2img request without its steps.
        steps: schedule points to try, one evaluation fewer each.
        pixels: what the picture should have, by who says so; one of them is enough.
    """

    name: str
    sizes: tuple[int, int, int]
    files: Mapping[str, tuple[int, int, int]]
    question: str
    answer: str
    drawing: Mapping[str, Any]
    steps: tuple[int, ...]
    pixels: Mapping[str, Pixels]


_GUIDANCE = {"cfg_text_scale": 4.0, "cfg_img_scale": 1.5, "cfg_interval": (0.4, 1.0), "timestep_shift": 3.0}

# The answer and the pixels are what vllm-omni's own tests ask of the published weights on an H100
# (`tests/distributed/omni_connectors/test_bagel_shared_memory_connector.py`); docs/verify.md has their story.
PUBLISHED = Known(
    "BAGEL-7B-MoT",
    sizes=(3584, 28, 152064),
    files={MAIN: (1223, 14_607_260_128, 29_214_520_256), AUTOENCODER: (244, 83_819_683, 335_278_732)},
    question="Where is the capital of France?",
    answer="The capital of France is Paris.",
    drawing={"prompt": "A cute cat", "seed": 52, "height": 1024, "width": 1024, **_GUIDANCE},
    steps=(15, 16),  # called 15 there, which has been 14 evaluations and 15 in turn
    pixels={
        "vllm-omni": {
            (100, 100): (115, 113, 94),
            (400, 50): (159, 160, 144),
            (700, 100): (164, 151, 123),
            (150, 400): (120, 121, 107),
            (512, 512): (165, 133, 127),
            (700, 400): (217, 130, 66),
            (100, 700): (191, 168, 152),
            (400, 700): (130, 96, 77),
            (700, 700): (247, 203, 140),
            (256, 256): (167, 156, 150),
        },
        # With `<|im_start|><|im_end|>` where guidance leads away from, in place of nothing as in the official code.
        "vllm-omni before April 2026": {
            (100, 100): (121, 118, 100),
            (400, 50): (163, 162, 143),
            (700, 100): (170, 156, 127),
            (150, 400): (129, 127, 112),
            (512, 512): (135, 61, 59),
            (700, 400): (205, 107, 43),
            (100, 700): (197, 177, 157),
            (400, 700): (139, 107, 86),
            (700, 700): (247, 205, 146),
            (256, 256): (171, 160, 153),
        },
    },
)

# Made by running it: float32 on a CPU, where bfloat16 is within one of it at these places.
DEMO = Known(
    "the bundled demo model",
    sizes=(192, 6, 704),
    files={MAIN: (255, 4_996_864, 9_993_728), AUTOENCODER: (108, 879_523, 1_759_046)},
    question="What is the capital of France?",
    answer="The capital of France is Paris.",
    drawing={"prompt": "a red circle on a white background", "seed": 52, "height": 64, "width": 64, **_GUIDANCE},
    steps=(15,),
    pixels={
        "itself": {
            (4, 4): (255, 254, 255),
            (60, 8): (255, 253, 255),
            (8, 56): (254, 253, 255),
            (32, 32): (255, 0, 3),
            (32, 12): (254, 0, 6),
            (20, 32): (253, 0, 4),
            (44, 32): (253, 0, 1),
            (28, 40): (255, 0, 1),
            (32, 48): (254, 255, 255),
            (50, 50): (254, 252, 254),
        }
    },
)
KNOWN = (PUBLISHED, DEMO)


@dataclass(frozen=True)
class Row:
    """A line of the table; `ok` is None where nothing is expected."""

    check: str
    expected: str
    got: str
    ok: bool | None = None


def find_known(config: BagelConfig) -> Known | None:
    """The known model that has these sizes, if one has."""
    trunk = config.trunk
    sizes = trunk.hidden_size, trunk.num_layers, trunk.vocab_size
    return next((known for known in KNOWN if known.sizes == sizes), None)


def check_files(directory: Path) -> tuple[list[Row], Known | None]:
    """What the headers of a checkpoint's files say, and which model they are of; no weight is read.

    Raises:
        InputError: there is no whole checkpoint in the directory.
    """
    if (directory / MANIFEST).exists():  # opening it compares every file's size with the manifest
        return [Row("converted weights", "whole", "whole", True)], find_known(ModelSource.open(directory).config)
    if not directory.is_dir():
        raise InputError(f"model {directory} is not a directory; give one that holds a BAGEL checkpoint")
    files = CheckpointFiles(directory)
    config = read_config(files)
    known, rows = find_known(config), []
    for kind, tensors in files.tensors.items():
        got = len(tensors), sum(info.size for info in tensors.values()), sum(i.num_bytes for i in tensors.values())
        wanted = known and known.files[kind]
        for name, value, right in zip(("tensors", "parameters", "bytes"), got, wanted or (None,) * 3, strict=True):
            expected, ok = ("-", None) if right is None else (f"{right:,}", value == right)
            rows.append(Row(f"{kind}: {name}", expected, f"{value:,}", ok))
    problems = PublishedCheckpoint(files, config).report().problems
    shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    rows.append(Row("names and shapes of tensors", "all fit", shown or "all fit", not problems))
    return rows, known


def check_answers(run: Run, known: Known | None) -> list[Row]:
    """What a model says and draws.

    Args:
        run: `Bagel.run`, or what does the same.
        known: which model it should be; None: another, which is asked the same, and may say what it likes.
    """
    asked = known or PUBLISHED
    answer = _run(run, Request.create("text2text", asked.question, max_tokens=_ANSWER_TOKENS))
    if isinstance(answer, str):
        rows = [Row(asked.question, "an answer", answer, False)]
    elif known is None:
        rows = [Row(asked.question, "-", repr(answer.text))]
    else:
        rows = [Row(asked.question, repr(known.answer), repr(answer.text), answer.text == known.answer)]
    drawing = dict(asked.drawing)
    if known is None:
        drawing |= {"height": None, "width": None}  # as large as it draws
    prompt = drawing.pop("prompt")
    drawn = {}
    for steps in asked.steps if known else asked.steps[:1]:
        result = _run(run, Request.create("text2img", prompt, steps=steps, **drawing))
        name = f"{prompt}, {steps - 1} evaluations"
        if isinstance(result, str):
            rows.append(Row(name, "a picture", result, False))
        else:
            drawn[steps] = result.image
            if known is None:
                mean = result.image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
                rows.append(Row(name, "-", f"{result.image.width}x{result.image.height}, on average {_rgb(mean)}"))
    return rows + (_pixel_rows(prompt, drawn, known.pixels) if known and drawn else [])


def _run(run: Run, request: Request) -> Result | str:
    """A result, or what is wrong."""
    try:
        return run(request)
    except FloatingPointError as error:
        return str(error)


def _pixel_rows(prompt: str, drawn: Mapping[int, Image.Image], pixels: Mapping[str, Pixels]) -> list[Row]:
    """How well each picture fits what each source says, and the pixels of the best fit."""
    off = {
        (steps, source): [_off(image.getpixel(place), right) for place, right in wanted.items()]
        for steps, image in drawn.items()
        for source, wanted in pixels.items()
    }
    best = min(off, key=lambda pair: max(off[pair]))
    fits = max(off[best]) <= TOLERANCE
    rows = []
    for pair, distances in off.items():
        steps, source = pair
        within = sum(one <= TOLERANCE for one in distances)
        got = f"{within} of {len(distances)} pixels, at most {max(distances)} off"
        # Where one fits, nothing is wrong with those that do not.
        ok = True if max(distances) <= TOLERANCE else None if fits else False
        rows.append(Row(f"{prompt}, {steps - 1} evaluations, {source}", f"within {TOLERANCE}", got, ok))
    steps, source = best
    for place, right in pixels[source].items():
        got = drawn[steps].getpixel(place)
        ok = _off(got, right) <= TOLERANCE
        rows.append(Row(f"  of the best fit, pixel {place[0]} {place[1]}", _rgb(right), _rgb(got), ok))
    return rows


def _off(got: Sequence[int], right: Sequence[int]) -> int:
    return max(abs(a - b) for a, b in zip(got, right, strict=True))


def _rgb(pixel: Sequence[int]) -> str:
    return " ".join(map(str, pixel))


def table(rows: Sequence[Row]) -> str:
    """Rows as text."""
    cells = [("check", "expected", "got", "ok")]
    cells += [(r.check, r.expected, r.got, {True: "yes", False: "NO", None: "-"}[r.ok]) for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = Parser(
        prog="python -m bagel_jax.verify",
        description="Looks whether a model is whole and computes what it should. The exit code is 0 if all is as "
        f"expected, {FAILED} if something differs, {BAD_INPUT} if there is no model.",
        allow_abbrev=False,
    )
    p.add_argument("--model", metavar="DIR", help="a BAGEL checkpoint (default: the bundled demo model)")
    p.add_argument("--fine-tuned", action="store_true", help="it was trained further: show answer and picture only")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: float32 on a CPU")
    serving = p.add_argument_group("serving")
    add_flags({"serving": serving, "images": serving}, EngineConfig, defaults=True)
    p.add_argument("--version", action="version", version=f"bagel_jax {__version__}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        config = from_flags(args, EngineConfig)
        directory = Path(args.model or MODEL)
        rows, known = check_files(directory)
        told = known.name if known else "no model that is known here"
        if all(row.ok is not False for row in rows):
            model = Bagel.open(directory, args.dtype, config)
            try:
                rows += check_answers(model.run, None if args.fine_tuned else known)
            finally:
                model.close()
            device = jax.devices()[0]
            told += f"; {jax.numpy.dtype(model.dtype).name} on {len(jax.devices())} {device.device_kind}"
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    wrong = sum(row.ok is False for row in rows)
    print(f"{directory}: {told}; bagel_jax {__version__}, jax {jax.__version__}\n")
    print(table(rows))
    print(f"\n{wrong} of {len(rows)} checks differ" if wrong else "\nall is as expected")
    return FAILED if wrong else DONE


if __name__ == "__main__":
    sys.exit(main())
