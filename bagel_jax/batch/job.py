"""What a job is: lines of a file in blocks, how a line becomes a request, and by what one job is told from another."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bagel_jax.batch.openai_lines import MAX_N, heading, is_openai, request_fields
from bagel_jax.batch.places import Names, Place
from bagel_jax.batch.sources import Source
from bagel_jax.errors import InputError, json_object
from bagel_jax.options import APPLICABLE, MAX_SEED
from bagel_jax.request import Request


@dataclass(frozen=True)
class Line:
    """A line of a job: its number, from 0, and what stands in it."""

    number: int
    text: bytes


@dataclass(frozen=True)
class Block:
    """Lines whose results appear together."""

    number: int
    lines: tuple[Line, ...]


class Job:
    """All requests of a source, in blocks; read as far as it is needed.

    Raises:
        InputError: it cannot be read, or holds no request.
    """

    def __init__(self, source: Source):
        self.source = source
        if next(self.blocks(1), None) is None:
            raise InputError(f"the job {source.name} holds no request; it must hold one a line, as JSON")

    def blocks(self, size: int) -> Iterator[Block]:
        """All blocks of `size` lines in order; one is in memory."""
        lines = itertools.starmap(Line, enumerate(self.source.lines()))
        for number in itertools.count():
            block = tuple(itertools.islice(lines, size))
            if not block:
                return
            yield Block(number, block)

    def count(self) -> float | None:
        """How many lines there are, as far as the source knows."""
        count = getattr(self.source, "count", None)
        return None if count is None else count()


@dataclass(frozen=True)
class Defaults:
    """What counts for lines that do not say otherwise.

    Args:
        fields: of a `RequestForm`; settings count where they have an effect.
        seed: of the first image of line 0; every further one has one more.
        num_images: images a line that makes them, of as many seeds.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    num_images: int = 1


def read_line(line: Line, base: Place, usual: Defaults) -> tuple[dict[str, Any], tuple[Request, ...] | Exception]:
    """A line as what it says of itself, and its requests, one an image or a text, or what is wrong with it.

    Args:
        line: a `RequestForm` as JSON, with free `metadata`; or a line of OpenAI's batch files.
        base: the folder that images' paths start from.
        usual: for what the line does not say.

    Returns:
        `id`, `modality`, `prompt`, `seed` and `metadata`, those that are there, with `openai` of a line in that form;
        and the requests.
    """
    said: dict[str, Any] = {"id": str(line.number), "line": line.number}
    try:
        try:
            text = line.text.decode().strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"line {line.number} is not valid Unicode text ({error.reason} at byte {error.start}); give it in UTF-8"
            ) from None
        data = json_object(text, '{"modality": "text2img", "prompt": "a red bench"}')
        count, step = None, usual.num_images
        if is_openai(data):
            said["openai"] = heading(data, line.number, line.text)
            said["id"] = str(data.get("custom_id"))
            data, count = request_fields(data)
            step = max(step, MAX_N)  # each line says how many it wants, and none shall have another's seeds
        elif "metadata" in data:
            said["metadata"] = data.pop("metadata")
        if type(data.get("id")) is int:
            data["id"] = str(data["id"])
        modality = data.get("modality", usual.fields.get("modality"))
        settings = APPLICABLE.get(modality, ()) if isinstance(modality, str) else ()
        known = {k: v for k, v in usual.fields.items() if k not in _SETTINGS or k in settings}
        seed = (usual.seed + line.number * step) % (MAX_SEED + 1)
        data = {"id": str(line.number), "seed": seed, **known, **data}
        said |= {name: data[name] for name, kind in _SAID.items() if type(data.get(name)) is kind}
        request = Request.from_json(data, Names(base))
        count = count or (usual.num_images if request.makes_image else 1)
        return said, tuple(replace(request, seed=(request.seed + i) % (MAX_SEED + 1)) for i in range(count))
    except Exception as error:  # whatever a line holds, the others go on
        return said, error


_SAID = {"id": str, "modality": str, "prompt": str, "seed": int}  # columns of one type, even where a line is wrong
_SETTINGS = frozenset(itertools.chain.from_iterable(APPLICABLE.values()))


def identity(job: Job, model: Path, usual: Defaults, **more: Any) -> dict[str, Any]:
    """All that a job's results depend on, for `job.json`; `more` is what else there is, by name."""
    settings = dict(usual.fields) | {"seed": usual.seed, "num_images": usual.num_images}
    return {
        "job_format": 2,
        "input": job.source.fingerprint(),
        "model": fingerprint(model),
        "settings": settings,
        **more,
    }


def fingerprint(model: Path) -> dict[str, Any]:
    """By what a model is known again: its files and their sizes, wherever it lies."""
    files = sorted(file for file in model.rglob("*") if file.is_file())
    named = [f"{file.relative_to(model).as_posix()} {file.stat().st_size}" for file in files]
    return {
        "files": len(files),
        "sha256": hashlib.sha256("\n".join(named).encode(errors="surrogateescape")).hexdigest(),
    }
