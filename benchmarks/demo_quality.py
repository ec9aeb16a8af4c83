"""Scores the small demo BAGEL by what the oracle reads from its images and by its exact words.

    python benchmarks/demo_quality.py --model DIR

Each task is scored on combinations of the training set ("trained") and on combinations that it never showed or named
("held out"), in fresh sizes and places, with the command line's default settings and fixed seeds. An edit is held out
if its source or its result is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count as endless
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from oracle import Reading, read
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from bagel_jax.demo.example import MODEL
from bagel_jax.errors import InputError, check_choice, check_whole
from bagel_jax.request import APPLICABLE, RENORM_TYPES, Request
from tools.demo import world
from tools.demo.world import Combination, Edit, Scene, caption, draw, held_out

TRAINED, HELD_OUT = SPLITS = "trained", "held out"
# What the project wants, in percent. There is no bound for plans.
WANTED: dict[str, dict[str, int]] = {
    "text2img": {TRAINED: 95, HELD_OUT: 85},
    "img2img": {TRAINED: 92, HELD_OUT: 82},
    "img2text": {TRAINED: 97, HELD_OUT: 85},
    "text2text": {TRAINED: 100},
    "think": {},
}
MOVE_LIMIT = 4.0  # pixels that an edit may move the centre
ASKED = ("caption", "color", "shape", "ground")  # the questions of img2text

_POOLS = {split: [c for c in world.COMBINATIONS if held_out(*c) == (split == HELD_OUT)] for split in SPLITS}


# --- Cases ---


@dataclass(frozen=True)
class Case:
    """One request and what is right; which of the optional fields there are depends on the task."""

    task: str
    split: str
    number: int  # among those of its task and split
    seed: int  # of the request
    prompt: str
    groups: tuple[str, ...] = ()  # those whose scores are reported too
    before: Scene | None = None  # the image that goes in
    edit: Edit | None = None
    shows: Combination | None = None  # what the image that comes out must show
    says: str | None = None  # what the text that comes out must be

    @property
    def name(self) -> str:
        """For example "img2img-held-out-007"."""
        return f"{self.task}-{self.split.replace(' ', '-')}-{self.number:03d}"


def cases(task: str, split: str, count: int, seed: int = 0) -> list[Case]:
    """The cases of a task (one of WANTED) on one of SPLITS; the i-th does not depend on `count`.

    There are fewer than `count` only for text2text, which has as many as there are facts, none of them held out.

    Raises:
        InputError: there is no such task or split, or a number is out of range.
    """
    check_choice("task", task, tuple(WANTED))
    check_choice("split", split, SPLITS)
    check_whole("cases", count, 1)
    check_whole("seed", seed, 0)
    # Another name than the training set's, so that none of its images comes again.
    asked = _ASK[task](split, Random(f"quality {seed} {task} {split}"))
    return [Case(task, split, i, seed + i, **fields) for i, fields in enumerate(islice(asked, count))]


def _combinations(split: str, rng: Random) -> Iterator[Combination]:
    """All of a split in random order, again and again."""
    while True:
        yield from rng.sample(_POOLS[split], len(_POOLS[split]))


def _text2img(split: str, rng: Random, *, think: bool) -> Iterator[dict[str, Any]]:
    for c in _combinations(split, rng):
        yield {"prompt": caption(c), "shows": c} | ({"says": world.plan(c)} if think else {})


def _img2img(split: str, rng: Random) -> Iterator[dict[str, Any]]:
    for i in endless():
        kind = world.EDIT_KINDS[i % len(world.EDIT_KINDS)]
        # Every other round of the kinds, so that both halves have all of them.
        from_held_out = split == HELD_OUT and i // len(world.EDIT_KINDS) % 2 == 1
        while True:
            c = rng.choice(_POOLS[HELD_OUT if from_held_out else TRAINED])
            edit = rng.choice(world.edits(c, kind))
            result = edit.result(c)
            if from_held_out or held_out(*result) == (split == HELD_OUT):
                break
        groups = [f"{kind} edits"]
        if split == HELD_OUT:
            groups.append("source held out" if from_held_out else "result held out")
        before = Scene.of(c, rng)
        yield {"prompt": edit.instruction, "groups": tuple(groups), "before": before, "edit": edit, "shows": result}


def _img2text(split: str, rng: Random) -> Iterator[dict[str, Any]]:
    # An order of its own for each question, so that each meets as many combinations as it can.
    orders = {kind: _combinations(split, Random(rng.random())) for kind in ASKED}
    for i in endless():
        kind = ASKED[i % len(ASKED)]
        c, question = next(orders[kind]), world.QUESTIONS[kind]
        before = Scene.of(c, rng)
        yield {"prompt": question.forms[0], "groups": (kind,), "before": before, "says": question.answer(c)}


def _text2text(split: str, rng: Random) -> Iterator[dict[str, Any]]:
    for fact in world.facts() if split == TRAINED else ():
        yield {"prompt": fact.forms[0], "says": fact.answer}


_ASK = {
    "text2img": partial(_text2img, think=False),
    "img2img": _img2img,
    "img2text": _img2text,
    "text2text": _text2text,
    "think": partial(_text2img, think=True),
}


# --- Scores ---


class Answer(NamedTuple):
    """What came of a case."""

    image: Image.Image | None = None
    text: str | None = None


class Verdict(NamedTuple):
    """Which parts of an answer are right, and what was read from it."""

    parts: dict[str, bool]
    read: dict[str, Any]

    @property
    def right(self) -> bool:
        """Whether all of it is."""
        return all(self.parts.values())


def judge(case: Case, answer: Answer) -> Verdict:
    """Judges an answer by its pixels and words alone; what is missing or of another size is wrong."""
    parts: dict[str, bool] = {}
    seen: dict[str, Any] = {}
    if case.says is not None:
        seen["text"] = answer.text
        right = answer.text is not None and answer.text.strip() == case.says
        parts["plan" if case.task == "think" else "answer"] = right
    if case.shows is not None:
        reading, seen["image"] = _read(answer.image)
        names = {name: getattr(reading, name, None) == value for name, value in case.shows._asdict().items()}
        if case.task == "think":
            parts["image"] = all(names.values())
        elif case.edit is None:
            parts |= names
        else:
            moved = math.nan if reading is None else reading.moved(read(draw(case.before)))
            seen["moved"] = _number(moved)
            parts["change"] = all(right for name, right in names.items() if getattr(case.edit, name) is not None)
            parts["rest"] = all(right for name, right in names.items() if getattr(case.edit, name) is None)
            parts["place"] = moved <= MOVE_LIMIT
    return Verdict(parts, seen)


def _read(image: Image.Image | None) -> tuple[Reading | None, dict[str, Any] | str]:
    """A reading, if there is one, and what json can hold of it."""
    if image is None:
        return None, "no image"
    try:
        reading = read(image)
    except InputError as error:
        return None, str(error)
    plain = {name: getattr(reading, name) for name in ("color", "shape", "ground")}
    plain |= {name: _number(getattr(reading, name)) for name in ("x", "y", "radius")}
    return reading, plain | {name: [*map(_number, getattr(reading, name))] for name in ("color_rgb", "ground_rgb")}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 1)


def score(asked: Sequence[Case], answer: Callable[[Case], Answer], save: Path | None = None) -> dict[str, Any]:
    """Judges the answers to cases of one task and split.

    Args:
        asked: from `cases`, at least one.
        answer: what is judged; called once a case.
        save: an existing directory for the images of failures: NAME.png is what came out, NAME-before.png what
            went in.

    Returns:
        What json can hold: `task`, `split`, `wanted` (percent or None), `cases` and `right` (counts), `percent`,
        `parts` (right by part), `groups` (`cases` and `right` by group), `seconds` and `failures`.
    """
    started = time.perf_counter()
    task, split = asked[0].task, asked[0].split
    judged: list[tuple[Case, Verdict]] = []
    right = 0
    with tqdm(asked, desc=f"{task}, {split}", unit="case") as bar:
        for case in bar:
            given = answer(case)
            verdict = judge(case, given)
            judged.append((case, verdict))
            right += verdict.right
            bar.set_postfix_str(f"{right} right", refresh=False)
            if save is not None and not verdict.right:
                _save(case, given, save)
    groups = {name: [v.right for c, v in judged if name in c.groups] for case in asked for name in case.groups}
    return {
        "task": task,
        "split": split,
        "wanted": WANTED[task].get(split),
        "cases": len(asked),
        "right": right,
        "percent": 100 * right / len(asked),
        "parts": {part: sum(v.parts[part] for _, v in judged) for part in judged[0][1].parts},
        "groups": {name: {"cases": len(rights), "right": sum(rights)} for name, rights in groups.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "failures": [_failure(case, verdict) for case, verdict in judged if not verdict.right],
    }


def _failure(case: Case, verdict: Verdict) -> dict[str, Any]:
    wanted = {"image": case.shows and caption(case.shows), "text": case.says}
    return {
        **{"name": case.name, "seed": case.seed, "prompt": case.prompt},
        "before": case.before and dataclasses.asdict(case.before),
        "wanted": {name: value for name, value in wanted.items() if value},
        "wrong": [part for part, good in verdict.parts.items() if not good],
        "read": verdict.read,
    }


def _save(case: Case, answer: Answer, directory: Path) -> None:
    if answer.image is not None:
        answer.image.save(directory / f"{case.name}.png")
    if case.before is not None:
        Image.fromarray(draw(case.before)).save(directory / f"{case.name}-before.png")


def report(scores: Sequence[dict[str, Any]]) -> str:
    """Scores (see `score`) as a Markdown table, and below it the parts and groups of each."""
    rows = ["| task | trained | held out | wanted |", "|---|---|---|---|"]
    for task in dict.fromkeys(s["task"] for s in scores):
        found = {s["split"]: f"{s['percent']:.1f} %" for s in scores if s["task"] == task}
        wanted = " / ".join(str(percent) for percent in WANTED[task].values())
        cells = [found.get(split, "–") for split in SPLITS] + [f"{wanted} %" if wanted else "–"]
        rows.append(f"| {task} | {' | '.join(cells)} |")
    rows.append("")
    for s in scores:
        details = [] if len(s["parts"]) == 1 else [(part, right, s["cases"]) for part, right in s["parts"].items()]
        details += [(group, n["right"], n["cases"]) for group, n in s["groups"].items()]
        shown = ", ".join(f"{name} {100 * right / of:.1f} %" for name, right, of in details)
        line = f"- {s['task']}, {s['split']}: {s['right']} of {s['cases']} right in {s['seconds']:.0f} s"
        rows.append(f"{line}; {shown}" if shown else line)
    return "\n".join(rows)


# --- The model ---


def request(case: Case, changed: dict[str, Any]) -> Request:
    """A case as a request with default settings, but for those `changed` that its modality has.

    Raises:
        InputError: a changed setting is out of range.
    """
    modality = "text2img" if case.task == "think" else case.task
    settings = {name: value for name, value in changed.items() if name in APPLICABLE[modality]}
    if modality == "text2img":  # larger models would draw larger, which the oracle does not read
        settings |= {"height": world.SIDE, "width": world.SIDE}
    image = None if case.before is None else Image.fromarray(draw(case.before))
    return Request.create(
        modality, case.prompt, image, seed=case.seed, think=case.task == "think", request_id=case.name, **settings
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for bad input."""
    try:
        _run(_parser().parse_args(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# Settings that can be changed for an experiment.
_SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"type": int} for name in ("steps", "max_think_tokens", "max_tokens")},
    **{name: {"type": float} for name in ("timestep_shift", "cfg_text_scale", "cfg_img_scale", "cfg_renorm_min")},
    "cfg_interval": {"type": float, "nargs": 2, "metavar": ("LO", "HI")},
    "cfg_renorm_type": {"choices": RENORM_TYPES},
}


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--model", metavar="DIR", type=Path, default=MODEL, help="a checkpoint (bagel_jax/demo/model)")
    p.add_argument("--tasks", nargs="+", choices=tuple(WANTED), default=tuple(WANTED), help="only these")
    p.add_argument("--cases", metavar="N", type=int, default=200, help="a task and split (%(default)s)")
    p.add_argument("--think-cases", metavar="N", type=int, default=50, help="those of think (%(default)s)")
    p.add_argument("--seed", metavar="S", type=int, default=0, help="another seed gives other cases (%(default)s)")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: float32 on a CPU")
    p.add_argument("--json", metavar="FILE", type=Path, help="write all numbers and the failures")
    p.add_argument("--save", metavar="DIR", type=Path, help="write the images of failures")
    g = p.add_argument_group("experiments", "settings other than the command line's defaults")
    for name, options in _SETTINGS.items():
        g.add_argument("--" + name.replace("_", "-"), **options)
    return p


def _run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    numbers = {task: args.think_cases if task == "think" else args.cases for task in args.tasks}
    asked = [cases(task, split, number, args.seed) for task, number in numbers.items() for split in SPLITS]
    asked = [some for some in asked if some]  # no fact is held out
    changed = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    settings = {some[0].task: request(some[0], changed).applicable_settings() for some in asked}

    from bagel_jax.bagel import Bagel  # late: brings jax, and bad arguments are found without it

    model = Bagel.open(args.model, args.dtype)
    _make_room(args.save, args.json)
    model.load_weights()

    def answer(case: Case) -> Answer:
        try:
            result = model.run(model.prepare(request(case, changed)))
        except FloatingPointError:  # the weights' fault: a wrong answer, and the other cases go on
            return Answer()
        return Answer(result.image, result.text)

    record = {"model": str(args.model), "dtype": args.dtype, "seed": args.seed, "changed": changed}
    record |= {"settings": settings, "scores": []}
    for some in asked:
        record["scores"].append(score(some, answer, args.save))
        record["seconds"] = round(time.perf_counter() - started, 1)
        if args.json is not None:  # after each, so that what was scored survives an interruption
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(report(record["scores"]))
    print(f"\n{args.model}, {args.dtype}, seed {args.seed}; {record['seconds']:.0f} s in all, compiling included.")
    if changed:
        print(f"Not the default settings: {_listed(changed)}.")
    print("Settings:")
    for task, values in settings.items():
        print(f"- {task}: {_listed(values)}")


def _listed(settings: dict[str, Any]) -> str:
    """For example "steps 50, cfg_interval 0.4 1.0"."""
    shown = {n: " ".join(map(str, v)) if isinstance(v, list | tuple) else v for n, v in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _make_room(save: Path | None, file: Path | None) -> None:
    """Finds out before the work whether its results can be written."""
    try:
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
        if file is not None:
            file.open("a").close()
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written ({error.strerror}); give another place") from None


if __name__ == "__main__":
    sys.exit(main())
