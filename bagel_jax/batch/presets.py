"""Benchmarks: their own prompt files as requests, and the results laid out as their scorers want them.

A preset gives the command line other defaults, those of the official scripts in `eval/gen`, and is the job's source.
When the job is done it links the images to where the benchmark's scorer looks for them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from bagel_jax.batch.output import JobFolder
from bagel_jax.batch.parquet import opened_table
from bagel_jax.batch.store import open_folder, temporary
from bagel_jax.errors import InputError
from bagel_jax.options import MAX_SEED

# What becomes part of a file's name.
_NAME = re.compile(r"\w[\w .-]{0,99}")


class Benchmark(ABC):
    """A benchmark's prompts, a `Source`.

    Attributes:
        flags: of the command line, where it does not say otherwise.
        thinking: more of them in think mode.
        crops: whether the official script cuts black borders off.
        one_image: whether a prompt has one image at most.
        named: what the benchmark's name is in the folder of results.
        like: what its file is, for who gives another.

    Args:
        path: the file of prompts.
        output: the folder of results.
        seed: of the command line.

    Raises:
        InputError: the file cannot be read, or is none of this benchmark.
    """

    flags: ClassVar[Mapping[str, Any]]
    thinking: ClassVar[Mapping[str, Any]] = {}
    crops: ClassVar[bool] = True
    one_image: ClassVar[bool] = True
    named: ClassVar[str]
    like: ClassVar[str]

    def __init__(self, path: Path, output: Path, seed: int):
        self.name, self.base = str(path), path.parent
        self.root = output / self.named
        self._path, self._seed = path, seed
        self._lines = [json.dumps(request).encode() for request in self._requests()]

    def lines(self) -> Iterator[bytes]:
        """All requests, as JSON."""
        return iter(self._lines)

    def fingerprint(self) -> dict[str, Any]:
        """By what the prompts are known again."""
        return {"preset": self.named, "sha256": hashlib.sha256(b"\n".join(self._lines)).hexdigest()}

    def prepare(self) -> None:  # noqa: B027 (most benchmarks need nothing)
        """What must lie on the disk before the first request; several workers may do it at once."""

    def lay_out(self, folder: JobFolder) -> str:
        """Links a job's images to where the scorer looks for them; returns what to tell of it.

        Args:
            folder: the job's, in which all parts are done.
        """
        missing = 0
        for record in itertools.chain.from_iterable(map(folder.records, folder.all_stats())):
            for name, text in self._files(record):
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                open_folder(self.root).write(name, text.encode())
            for k, one in enumerate(record.get("images", [record])):
                if one.get("image") is None:
                    missing += 1
                else:
                    self._put(folder.path / one["image"], self.root / self._image(record, k))
        return f"{self.root} is for the scorer" + (f"; {missing:,} of its images are missing" if missing else "")

    def _put(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            return
        if self.crops:
            with Image.open(source) as image:
                box = image.getbbox()
                if box not in (None, (0, 0, *image.size)):
                    new = temporary(target)
                    image.crop(box).save(new, "PNG")
                    new.replace(target)
                    return
        with contextlib.suppress(FileExistsError):  # another worker's, the same
            os.link(source, target)

    @abstractmethod
    def _requests(self) -> Iterable[dict[str, Any]]:
        """All requests, each with its id and metadata."""

    def _image(self, record: Mapping[str, Any], k: int) -> str:
        """Where image k of a record goes."""
        return f"{record['id']}.png"

    def _files(self, record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
        """What else goes beside them, and what is in it: the plan of think mode."""
        if record.get("text") is not None:
            yield f"{record['id']}.txt", record["text"]

    def _wrong(self, what: str) -> InputError:
        return InputError(f"{self._path} {what}; {self.named} reads {self.like}")

    def _text(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise self._wrong(f"cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise self._wrong("is not valid Unicode text") from None

    def _json(self, text: str, where: str, kind: type) -> Any:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"is no JSON{where} ({error})") from None
        if not isinstance(data, kind):
            raise self._wrong(f"holds a JSON {type(data).__name__}{where}")
        return data

    def _field(self, entry: Any, number: int | str, name: str, kind: type | tuple[type, ...] = str) -> Any:
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._wrong(f"has no usable {name!r} in entry {number}")
        return value

    def _checked_name(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise self._wrong(f"has {name!r} for part of a file's name")
        return name


_TEXT_TO_IMAGE = {
    "height": 1024,
    "width": 1024,
    "steps": 50,
    "timestep_shift": 3.0,
    "cfg_text_scale": 4.0,
    "cfg_img_scale": 1.0,
    "cfg_renorm_type": "global",
    "cfg_renorm_min": 0.0,
    "noise": "official",
    "seed": 42,
}
_EDIT = {
    "steps": 50,
    "timestep_shift": 3.0,
    "cfg_text_scale": 4.0,
    "cfg_img_scale": 1.5,
    "cfg_renorm_type": "text_channel",
    "cfg_renorm_min": 0.0,
    "noise": "official",
    "seed": 42,
}
_SAMPLED = {"do_sample": True, "text_temperature": 0.3}


class GenEval(Benchmark):
    """GenEval's `evaluation_metadata.jsonl`: `00000/metadata.jsonl` and `00000/samples/00000.png`, … a prompt."""

    flags = _TEXT_TO_IMAGE | {"cfg_interval": (0.0, 1.0), "num_images": 4}
    one_image = False
    named, like = "geneval", 'a line a prompt, as {"tag": "single_object", "prompt": "a photo of a bench"}'

    def _requests(self) -> Iterable[dict[str, Any]]:
        for number, line in enumerate(filter(str.strip, self._text().split("\n"))):
            entry = self._json(line, f" in line {number}", dict)
            prompt = self._field(entry, number, "prompt")
            yield {"modality": "text2img", "prompt": prompt, "id": f"{number:05}", "metadata": entry}

    def _image(self, record: Mapping[str, Any], k: int) -> str:
        return f"{record['id']}/samples/{k:05}.png"

    def _files(self, record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
        yield f"{record['id']}/metadata.jsonl", json.dumps(record["metadata"])


class Wise(Benchmark):
    """WISE's `final_data.json`, or one of its parts: `1.png` a prompt, and with a plan `1.txt`."""

    flags = _TEXT_TO_IMAGE | {"cfg_interval": (0.4, 1.0)}
    thinking = _SAMPLED | {"max_think_tokens": 2048}
    named, like = "wise", 'a list as [{"Prompt": "Traditional food of the Mid-Autumn Festival", "prompt_id": 1}]'

    def _requests(self) -> Iterable[dict[str, Any]]:
        for number, entry in enumerate(self._json(self._text(), "", list)):
            prompt = self._field(entry, number, "Prompt")
            name = self._checked_name(str(self._field(entry, number, "prompt_id", (int, str))))
            yield {"modality": "text2img", "prompt": prompt, "id": name, "metadata": entry}


class ImgEdit(Benchmark):
    """ImgEdit's `singleturn.json`, which lies beside its images: `1.png` an edit, and with a plan `1.txt`."""

    flags = _EDIT | {"cfg_interval": (0.0, 1.0)}
    thinking = Wise.thinking
    named, like = "imgedit", 'an object as {"1": {"id": "animal/000342021.jpg", "prompt": "Change the cat to a dog."}}'

    def _requests(self) -> Iterable[dict[str, Any]]:
        for name, entry in self._json(self._text(), "", dict).items():
            image, prompt = (self._field(entry, name, field) for field in ("id", "prompt"))
            name = self._checked_name(name)
            yield {"modality": "img2img", "prompt": prompt, "image": image, "id": name, "metadata": entry}


class GEdit(Benchmark):
    """GEdit-Bench's Parquet files: `gen_image/fullset/TASK/LANGUAGE/KEY.png` an edit, its source `KEY_SRCIMG.png`."""

    flags = _EDIT | {"cfg_interval": (0.4, 1.0)}
    thinking = _SAMPLED | {"max_think_tokens": 10240}
    crops = False
    named, like = "gedit", "a Parquet file, or the folder of them, with key, task_type, instruction, input_image, …"

    _COLUMNS = ("key", "task_type", "instruction_language")

    def _requests(self) -> Iterable[dict[str, Any]]:
        self.base = self.root  # images lie in the Parquet files: `prepare` puts them where the scorer wants them too
        for number, row in self._rows((*self._COLUMNS, "instruction")):
            about = {name: self._checked_name(self._field(row, number, name)) for name in self._COLUMNS}
            yield {
                "modality": "img2img",
                "prompt": self._field(row, number, "instruction"),
                "image": f"{self._place(about)}_SRCIMG.png",
                "id": about["key"],
                # The official script begins anew with its seed for every edit. The image's posterior sample is the
                # GPU's there, so that the latent is the seed's first draw; a seed of its own leaves it that here.
                "seed": self._seed,
                "image_seeds": [(self._seed + 1) % (MAX_SEED + 1)],
                "metadata": about,
            }

    def prepare(self) -> None:
        """Takes the images out of the Parquet files."""
        for number, row in self._rows((*self._COLUMNS, "input_image")):
            target = self.root / f"{self._place(row)}_SRCIMG.png"
            data = self._field(self._field(row, number, "input_image", dict), number, "bytes", bytes)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                new = temporary(target)
                new.write_bytes(data)  # whatever its format: who reads it looks at its beginning, not at its name
                new.replace(target)

    def _image(self, record: Mapping[str, Any], k: int) -> str:
        return f"{self._place(record['metadata'])}.png"

    def _files(self, record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
        return ()

    def _place(self, about: Mapping[str, Any]) -> str:
        return f"gen_image/fullset/{about['task_type']}/{about['instruction_language']}/{about['key']}"

    def _rows(self, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Some columns of all rows, with the rows' numbers; a few rows are in memory."""
        files = sorted(self._path.rglob("*.parquet")) if self._path.is_dir() else [self._path]
        if not files:
            raise self._wrong("holds no Parquet file")
        number = itertools.count()
        for file in files:
            with opened_table(file, str(file)) as table:
                if gone := [name for name in columns if name not in table.schema_arrow.names]:
                    raise self._wrong(f"has no column {gone[0]} in {file.name}")
                for batch in table.iter_batches(batch_size=16, columns=list(columns)):
                    yield from zip(number, batch.to_pylist())  # noqa: B905 (one of them has no end)


PRESETS: Mapping[str, type[Benchmark]] = {kind.named: kind for kind in (GenEval, Wise, GEdit, ImgEdit)}


def preset_flags(name: str, think: bool) -> dict[str, Any]:
    """What the command line's flags are if they are not given."""
    kind = PRESETS[name]
    return dict(kind.flags) | (kind.thinking if think else {})


def open_preset(args: argparse.Namespace) -> Benchmark:
    """The benchmark that a command line names.

    Raises:
        InputError: its file is none, or a flag has no meaning for it.
    """
    kind = PRESETS[args.preset]
    if args.format != "files":
        raise InputError(f"format is {args.format}; --preset {kind.named} needs files, which it lays out")
    for name, given in (("JOB", args.job), ("--output", args.output)):
        if "://" in given:  # its images are links, and cut
            raise InputError(f"{name} is {given}; --preset {kind.named} needs a file and a folder of this machine")
    if args.prompts is not None:
        raise InputError(f"prompts are given; {kind.named} has its own, so leave --prompts out")
    if kind.one_image and args.num_images > 1:
        raise InputError(f"num_images is {args.num_images}; {kind.named} has one image a prompt")
    return kind(Path(args.job), Path(args.output), args.seed)
